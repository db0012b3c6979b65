"use strict";

const find = (id) => document.getElementById(id);
let models = [];
let key = "";
let shown = 0; // number of the newest image: answers for older ones are dropped
let early = null; // an image that came before the models were known

const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

async function start() {
  const answer = await fetch("models", { headers: headers() });
  find("key").hidden = answer.status !== 401;
  if (answer.status === 401) {
    find("served").textContent = key ? "That key is not accepted." : "";
    return;
  }
  models = await answer.json();
  find("served").textContent =
    models.length === 1 ? `${models[0].num_classes} classes` : `${models.length} models side by side`;
  for (const model of models) {
    const card = find("card").content.cloneNode(true).firstElementChild;
    card.id = `card-${model.name}`;
    card.querySelector("h2").textContent = model.name;
    card.querySelector(".about").textContent = `${model.architecture} on ${model.engine}, ${model.precision}`;
    card.querySelector(".latency").textContent = "Waiting for an image";
    find("results").append(card);
  }
  const first = models.find((model) => model.num_samples);
  if (first) addSamples(first);
  if (early) predict(early);
}

async function addSamples(model) {
  for (let i = 0; i < model.num_samples; i++) {
    const answer = await fetch(`samples/${model.name}/${i}`, { headers: headers() });
    if (!answer.ok) return;
    const blob = await answer.blob();
    const button = document.createElement("button");
    button.type = "button";
    const image = new Image();
    image.src = URL.createObjectURL(blob);
    image.alt = `Sample ${i + 1}`;
    button.append(image);
    button.addEventListener("click", () => predict(new File([blob], `sample-${i + 1}.png`)));
    find("strip").append(button);
    find("samples").hidden = false;
  }
}

function preview(file) {
  const image = find("preview");
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  image.alt = file.name || "Your image";
  image.onload = () => image.classList.toggle("small", image.naturalWidth < 100);
  image.onerror = () => { image.hidden = true; find("hint").hidden = false; };
  image.hidden = false;
  find("hint").hidden = true;
  find("drop").classList.add("filled");
}

function complain(text) {
  find("problem").textContent = text;
  find("problem").hidden = !text;
}

async function predict(file) {
  const number = ++shown;
  complain("");
  preview(file);
  early = models.length ? null : file;
  await Promise.all(models.map((model) => ask(model, file, number)));
}

async function ask(model, file, number) {
  const card = find(`card-${model.name}`);
  card.classList.add("waiting");
  const form = new FormData();
  form.append("model", model.name);
  form.append("top_k", "5");
  form.append("files", file);
  const began = performance.now();
  let answer, content;
  try {
    answer = await fetch("predict", { method: "POST", body: form, headers: headers() });
    content = await answer.json();
  } catch {
    if (number === shown) complain("The server cannot be reached.");
    return;
  } finally {
    if (number === shown) card.classList.remove("waiting");
  }
  if (number !== shown) return;
  if (!answer.ok) {
    card.querySelector(".bars").replaceChildren();
    card.querySelector(".latency").textContent = "No prediction";
    complain(`${file.name || "The image"}: ${content.detail}`);
    return;
  }
  draw(card, content, performance.now() - began);
}

function draw(card, content, total) {
  const rows = content.predictions[0].classes.map(({ name, probability }) => {
    const row = document.createElement("li");
    row.style.setProperty("--share", `${(100 * probability).toFixed(2)}%`);
    for (const [kind, text] of [["name", name], ["share", `${(100 * probability).toFixed(1)} %`]]) {
      const span = document.createElement("span");
      span.className = kind;
      span.textContent = text;
      row.append(span);
    }
    return row;
  });
  card.querySelector(".bars").replaceChildren(...rows);
  card.querySelector(".latency").textContent =
    `${content.latency_ms.toFixed(1)} ms on the server, ${total.toFixed(0)} ms in all`;
}

const drop = find("drop");
find("file").addEventListener("change", (event) => event.target.files[0] && predict(event.target.files[0]));
drop.addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); find("file").click(); }
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) predict(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files][0];
  if (file) predict(file);
});
find("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("key-input").value;
  start();
});
start();
