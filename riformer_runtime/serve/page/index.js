// The page: an image goes to /predict once for each model, one after another, so that each time shown is its own.

const TOP_K = 5;
const byId = (id) => document.getElementById(id);
const cards = new Map();
let current = 0;

const key = () => sessionStorage.getItem("key") || "";

async function request(path, options = {}) {
  const headers = key() ? { Authorization: `Bearer ${key()}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The server does not answer. It may have stopped, or refused the file.");
  }
  if (response.ok) return response;
  if (response.status === 401) askForKey(true);
  const answer = await response.json().catch(() => ({}));
  throw new Error(answer.detail || `The server answered ${response.status}.`);
}

function askForKey(asked) {
  byId("key").hidden = !asked;
  byId("work").hidden = asked;
  byId("key-error").hidden = !asked || !key();
  if (asked) byId("key-text").focus();
}

async function start() {
  let served;
  try {
    served = await (await request("/models")).json();
  } catch (error) {
    return showError(error.message);
  }
  askForKey(false);
  showError("");
  byId("models").textContent = served.length > 1 ? "Each model names" : "The model names";
  byId("status").classList.toggle("unseen", served.length < 2);
  cards.clear();
  byId("cards").replaceChildren(...served.map(card));
  const withSamples = served.find((model) => model.num_samples);
  if (withSamples) await showSamples(withSamples);
}

function card(model) {
  const node = byId("card").content.cloneNode(true).firstElementChild;
  const engine = [model.engine, model.detail].filter(Boolean).join(" ");
  node.dataset.model = model.name;
  node.querySelector("h2").textContent = model.name;
  node.querySelector(".kind").textContent = `${engine}, ${model.precision}, ${model.num_classes.toLocaleString("en")} classes`;
  cards.set(model.name, node);
  clear(node, Math.min(TOP_K, model.num_classes));
  return node;
}

function clear(node, rows = node.querySelectorAll("li").length) {
  node.classList.add("empty");
  node.querySelector(".classes").replaceChildren(...Array.from({ length: rows }, row));
  node.querySelector(".classes").setAttribute("aria-hidden", "true");
  node.querySelector(".times").textContent = "The classes appear here.";
}

function row() {
  return byId("row").content.cloneNode(true).firstElementChild;
}

async function showSamples(model) {
  const items = await Promise.all(Array.from({ length: model.num_samples }, async (_, i) => {
    const path = `/samples/${encodeURIComponent(model.name)}/${i}.png`;
    const blob = await (await request(path)).blob();
    const image = Object.assign(new Image(), { src: URL.createObjectURL(blob), alt: "" });
    image.onload = () => image.classList.toggle("small", image.naturalWidth < 64);
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `sample ${i + 1}`);
    button.setAttribute("aria-pressed", "false");
    button.append(image);
    button.onclick = () => label(new File([blob], `sample ${i + 1}`, { type: "image/png" }), button);
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
  byId("samples").querySelector("ul").replaceChildren(...items);
  byId("samples").hidden = false;
}

function showPreview(file) {
  const image = byId("preview");
  if (image.src) URL.revokeObjectURL(image.src);
  image.onload = () => {
    image.classList.toggle("small", image.naturalWidth < 64);
    image.hidden = false;
    byId("drop").classList.add("full");
  };
  image.onerror = () => {
    image.hidden = true;
    byId("drop").classList.remove("full");
  };
  image.src = URL.createObjectURL(file);
  image.alt = `preview of ${file.name}`;
  byId("caption").textContent = file.name;
  byId("caption").hidden = false;
}

function showError(message) {
  byId("error").textContent = message;
  byId("error").hidden = !message;
}

async function label(file, button = null) {
  const mine = ++current;
  for (const other of document.querySelectorAll(".samples button")) other.setAttribute("aria-pressed", String(other === button));
  showError("");
  byId("status").textContent = "";
  for (const node of cards.values()) clear(node);
  showPreview(file);
  await ready;
  const best = [];
  for (const [name, node] of cards) {
    node.setAttribute("aria-busy", "true");
    try {
      const answer = await ask(name, file);
      if (mine !== current) return;
      show(node, answer);
      best.push(answer.image.classes[0].name);
    } catch (error) {
      if (mine === current) showError(error.message);
      return;
    } finally {
      node.setAttribute("aria-busy", "false");
    }
  }
  byId("status").textContent = summary(best);
}

async function ask(model, file) {
  const form = new FormData();
  form.append("files", file, file.name);
  form.append("model", model);
  form.append("top_k", TOP_K);
  const started = performance.now();
  const response = await request("/predict", { method: "POST", body: form });
  const { predictions: [image] } = await response.json();
  return { image, roundTrip: performance.now() - started };
}

function show(node, { image, roundTrip }) {
  const rows = image.classes.map(({ name, probability }) => {
    const one = row();
    one.querySelector(".name").textContent = name;
    one.querySelector(".share").textContent = percent(probability);
    requestAnimationFrame(() => requestAnimationFrame(() => { one.querySelector("i").style.width = `${100 * probability}%`; }));
    return one;
  });
  node.classList.remove("empty");
  if (matchMedia("(max-width: 900px)").matches && node === cards.values().next().value) node.scrollIntoView({ block: "nearest" });
  node.querySelector(".classes").removeAttribute("aria-hidden");
  node.querySelector(".classes").replaceChildren(...rows);
  const network = document.createElement("b");
  network.textContent = `${milliseconds(image.compute_ms)} in the network`;
  node.querySelector(".times").replaceChildren(network, `, ${milliseconds(roundTrip)} there and back`);
}

function summary(best) {
  if (best.length < 2) return best.length ? `Most probable: “${best[0]}”.` : "";
  return new Set(best).size === 1
    ? `${best.length === 2 ? "Both" : "All"} models say “${best[0]}”.`
    : `The models disagree: ${best.map((name) => `“${name}”`).join(", ")}.`;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;

byId("file").onchange = ({ target }) => {
  if (target.files.length) label(target.files[0]);
  target.value = "";
};
byId("key").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", byId("key-text").value.trim());
  ready = start();
};
addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  if (event.dataTransfer.files.length) label(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) label(event.clipboardData.files[0]);
});
let ready = start();
