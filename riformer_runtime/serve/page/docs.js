// The description of the API, drawn from /openapi.json without anything from another server.

const byId = (id) => document.getElementById(id);

function element(tag, text = "", ...children) {
  const node = document.createElement(tag);
  node.append(text, ...children);
  return node;
}

function list(rows) {
  const node = document.createElement("dl");
  for (const [name, text] of rows) node.append(element("dt", name), element("dd", text));
  return node;
}

function typeOf(schema) {
  if (schema.$ref) return "object";
  if (schema.type === "array") return `list of ${typeOf(schema.items)}s`;
  return schema.format === "binary" ? "file" : schema.type || "any";
}

function fields(schemas, schema, prefix = "") {
  const known = schema.$ref ? schemas[schema.$ref.split("/").pop()] : schema;
  const inside = known.items || (known.type === "array" ? {} : null);
  if (inside) return fields(schemas, inside, `${prefix}[]`);
  return Object.entries(known.properties || {}).flatMap(([name, field]) => {
    const path = prefix ? `${prefix}.${name}` : name;
    const text = [typeOf(field), field.description].filter(Boolean).join("; ");
    return [[path, text], ...(field.$ref || field.items ? fields(schemas, field, path) : [])];
  });
}

function route(path, method, operation, schemas) {
  const node = element("section", "", element("h2", "", element("b", method.toUpperCase()), " ", path));
  node.className = "route";
  if (operation.description) node.append(element("p", operation.description));
  const parameters = (operation.parameters || []).map((one) => [one.name, [typeOf(one.schema), one.description].filter(Boolean).join("; ")]);
  if (parameters.length) node.append(element("h3", "Parameters"), list(parameters));
  for (const [kind, { schema }] of Object.entries(operation.requestBody?.content || {})) {
    node.append(element("h3", `Body as ${kind}`), list(fields({ ...schemas, ...schema.$defs }, schema)));
  }
  const answer = operation.responses["200"]?.content?.["application/json"]?.schema;
  const answered = answer ? fields(schemas, answer) : [];
  if (answered.length) node.append(element("h3", "Answer"), list(answered));
  const errors = Object.entries(operation.responses).filter(([status]) => status >= 400);
  if (errors.length) node.append(element("h3", "Errors"), list(errors.map(([status, one]) => [status, one.description])));
  return node;
}

const description = await (await fetch("/openapi.json")).json();
const schemas = description.components?.schemas || {};
byId("about").textContent = description.info.description;
byId("examples").textContent = [
  `curl -F files=@cat.jpg -F files=@dog.jpg ${location.origin}/predict`,
  `curl -F files=@cat.jpg -F top_k=3 ${location.origin}/predict`,
  `echo '{"images": ["'$(base64 -w0 cat.jpg)'"], "top_k": 3}' | curl --json @- ${location.origin}/predict`,
].join("\n");
for (const [path, methods] of Object.entries(description.paths)) {
  for (const [method, operation] of Object.entries(methods)) byId("routes").append(route(path, method, operation, schemas));
}
