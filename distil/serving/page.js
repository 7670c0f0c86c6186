"use strict";
const VARIANTS = ["base", "sft", "kd", "dpo"];
const CHUNK = 32, CHUNK_LETTERS = 150_000;  // rows and letters of a batch request
const MOST_FIELDS = 30, MOST_LABELS = 10, TOP = 5;
const $ = (id) => document.getElementById(id);
let task = null;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function label(text) {  // may break behind _
  return text.split(/(?<=_)/).flatMap((part, i) => i ? [element("wbr"), part] : [part]);
}

// ---------------------------------------------------------------- requests

async function ask(path, body, kind = "application/json") {
  const headers = body === undefined ? {} : {"Content-Type": kind};
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  const started = performance.now();
  let reply, answer;
  try {
    reply = await fetch(path, {method: body === undefined ? "GET" : "POST", headers, body});
    answer = await reply.json();
  } catch (problem) {
    throw new Error("The server cannot be reached.");
  }
  if (!reply.ok) {
    const {code, message, hint} = answer.error;
    const error = new Error(hint ? `${message}: ${hint}` : message);
    const retry = reply.status === 503 && reply.headers.get("Retry-After");
    throw Object.assign(error, {code, status: reply.status, retry});
  }
  return {answer, ms: performance.now() - started};
}

const post = (path, body) => ask(path, JSON.stringify(body));

// ---------------------------------------------------------------- the task

const inputOf = (field) => $("f_" + field.name);
const rangeOf = ({kind, range}) => kind !== "number" ? kind : range ? `number, ${range[0]} to ${range[1]}` : "number";

async function showTask() {
  try {
    task = (await ask("task")).answer;
  } catch (error) {
    $("status").textContent = error.status === 401 ? "Enter the API key." : error.message;
    $("access").open = error.status === 401;
    return;
  }
  $("status").textContent = "";
  document.title = $("name").textContent = task.name;
  $("instruction").textContent = task.instruction;
  $("features").maxLength = task.max_features;
  $("featureslabel").textContent = task.text_column ?? "All fields as one text";
  $("either").hidden = !task.fields.length;
  const inputs = task.fields.map((field) => {
    const input = element("input", {id: "f_" + field.name, placeholder: rangeOf(field), autocomplete: "off"});
    input.addEventListener("input", () => { $("features").value = ""; });
    return element("div", {}, element("label", {htmlFor: input.id, textContent: field.name}), input);
  });
  const shown = inputs.slice(0, MOST_FIELDS), more = inputs.slice(MOST_FIELDS);
  $("fields").replaceChildren(...shown);
  if (more.length) {
    $("fields").append(element("details", {}, element("summary", {textContent: `${more.length} more fields`}), ...more));
  }
  const columns = task.text_column ? `A column ${task.text_column}` : `Columns ${task.columns.join(", ")}`;
  const size = `${task.max_rows.toLocaleString("en")} rows and ${task.max_bytes / 1e6} MB`;
  $("columns").textContent = `${columns}, or a column features. CSV, .csv.gz, .xlsx, .parquet, JSON or JSONL of up to ${size}.`;
}

$("features").addEventListener("input", () => task?.fields.forEach((field) => { inputOf(field).value = ""; }));
$("key").addEventListener("change", showTask);
$("example").addEventListener("click", () => {
  if (!task) return;
  $("features").value = task.text_column ? task.example[task.text_column] : "";
  for (const field of task.fields) inputOf(field).value = task.example[field.name];
});

// ---------------------------------------------------------------- one row

function rowOfForm() {
  const text = $("features").value.trim();
  if (text) return {features: text};
  const filled = task.fields.map((field) => [field.name, inputOf(field).value.trim()]).filter(([, value]) => value);
  return filled.length ? {fields: Object.fromEntries(filled)} : null;
}

function labelsShown({probabilities}) {
  if (task.labels.length <= MOST_LABELS) return task.labels;
  return [...task.labels].sort((one, other) => probabilities[other] - probabilities[one]).slice(0, TOP);
}

function card(variant, content) {
  return element("section", {className: "card"}, element("h3", {textContent: variant}), ...content);
}

function resultCard(variant, {answer, ms}) {
  const labels = labelsShown(answer);
  const long = labels.some((name) => name.length > 14) ? " long" : "";
  const bars = labels.map((name) => {
    const share = answer.probabilities[name];
    const fill = element("div", {className: "fill"});
    fill.style.width = 100 * share + "%";
    return element("div", {className: (name === answer.prediction ? "bar best" : "bar") + long},
      element("span", {}, ...label(name)),
      element("div", {className: "track"}, fill),
      element("span", {textContent: (100 * share).toFixed(1) + " %"}));
  });
  const head = element("tr", {}, ...["", "raw", "prior", "bias", "calibrated"].map((text) =>
    element("th", {textContent: text, scope: "col"})));
  const lines = labels.map((name) => element("tr", {}, element("th", {scope: "row"}, ...label(name)),
    ...[answer.raw_scores[name], answer.prior[name],
      answer.scores[name] - answer.raw_scores[name] + answer.prior[name],  // what was fitted, else 0
      answer.scores[name]].map((value) => element("td", {textContent: value.toFixed(2).replace(/^-0.00$/, "0.00")}))));
  const notes = [...answer.extra?.notes ?? [], ...answer.extra?.refer ? ["unsure: a person should decide"] : []];
  const rest = task.labels.length - labels.length;
  return card(variant, [
    element("p", {className: "model", textContent: answer.model_name}),
    element("p", {className: "verdict"}, ...label(answer.prediction)),
    ...bars,
    ...rest ? [element("p", {className: "foot", textContent: `and ${rest} labels less probable`})] : [],
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines)),
    element("p", {className: "foot", textContent: `margin ${answer.top2_margin.toFixed(2)} · ${Math.round(ms)} ms`}),
    ...notes.length ? [listOf(notes)] : [],
  ]);
}

const listOf = (notes) => element("ul", {className: "notes"}, ...notes.map((text) => element("li", {textContent: text})));

async function compare(event) {
  event.preventDefault();
  if (!task) return showTask();
  const row = rowOfForm();
  if (!row) { $("status").textContent = "Nothing is filled in."; return; }
  $("compare").disabled = true;
  $("status").textContent = "Asking the four models …";
  const cards = await Promise.all(VARIANTS.map(async (variant) => {
    try {
      return resultCard(variant, await post("infer/" + variant, row));
    } catch (error) {
      return card(variant, [element("p", {className: "error", textContent: error.message})]);
    }
  }));
  $("cards").replaceChildren(...cards);
  const answers = [...$("cards").querySelectorAll(".verdict")].map((v) => v.textContent);
  $("status").textContent = answers.length ? `Answers: ${answers.join(", ")}.` : "No model answered.";
  $("compare").disabled = false;
}

$("form").addEventListener("submit", compare);

// ---------------------------------------------------------------- many rows

let stopped = false, lastFile = null;
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const say = (text) => { $("filestatus").textContent = text; };

async function scoreChunk(path, features) {  // each result, or {error}
  for (let attempt = 0; ; attempt++) {
    try {
      return (await post(path, {features})).answer.results;
    } catch (error) {
      const half = Math.ceil(features.length / 2);
      if (features.length > 1 && [422, 504].includes(error.status)) {  // one row is wrong, or all take too long
        const first = await scoreChunk(path, features.slice(0, half));
        return stopped ? first : [...first, ...await scoreChunk(path, features.slice(half))];
      }
      if (error.status === 422) return [{error: error.message}];
      if (!error.retry || attempt === 30) throw error;
      await pause(1000 * error.retry);
      if (stopped) return [];
    }
  }
}

function chunksOf(numbers, features) {
  const chunks = [];
  let letters = Infinity;
  for (const number of numbers) {
    const size = features[number].length;
    if (letters + size > CHUNK_LETTERS || chunks.at(-1).length === CHUNK) { chunks.push([]); letters = 0; }
    chunks.at(-1).push(number);
    letters += size;
  }
  return chunks;
}

async function scoreFile(file) {
  $("download").hidden = true;
  $("notes").replaceChildren();
  if (!file || !task) return;
  lastFile = file;
  if (file.size > task.max_bytes) return say(`The file has more than ${task.max_bytes / 1e6} MB. infer_creditmix.py takes more.`);
  const path = `infer/${$("variant").value}/batch`, results = [];
  let table, left = 0;
  stopped = false;
  $("file").disabled = true;
  try {
    say("Reading the file …");
    const query = new URLSearchParams({name: file.name.slice(-100), decimal: $("decimal").value});
    table = (await ask("table?" + query, file, "application/octet-stream")).answer;
    const {features, problems} = table;
    for (const number in problems) results[number] = {error: problems[number]};
    const chunks = chunksOf([...features.keys()].filter((number) => !(number in problems)), features);
    left = features.length - Object.keys(problems).length;
    const all = left;
    $("stop").hidden = $("progress").hidden = false;
    for (const chunk of chunks) {
      $("progress").value = 1 - left / all;
      say(`${all - left} of ${all} rows scored`);
      const scored = await scoreChunk(path, chunk.map((number) => features[number]));
      scored.forEach((result, i) => { results[chunk[i]] = result; });
      left -= scored.length;
      if (stopped) break;
    }
  } catch (error) {
    say(table ? `After ${table.features.length - left} rows: ${error.message}` : error.message);
    if (error.code === "two_readings") $("decimal").focus();
    return;
  } finally {
    $("stop").hidden = $("progress").hidden = true;
    $("file").disabled = false;
    $("file").value = "";
    if (table) showNotes(table, results);
    if (results.some((result) => result.prediction !== undefined)) offer(table, results);
  }
  const failed = results.filter((result) => result.error).length, all = table.features.length;
  const done = stopped ? `Stopped after ${all - left} of ${all} rows.` : `All ${all} rows scored.`;
  say(failed ? `${all - left - failed} of ${all} rows scored, ${failed} could not be.` : done);
}

function showNotes(table, results) {  // what was assumed, then what was not read, by how many rows
  const lines = table.notes.slice(0, 20), counts = new Map();
  results.forEach((result, number) => {
    if (result.error) lines.push(`row ${table.lines[number]}: ${result.error}`);
    for (const note of result.extra?.notes ?? []) counts.set(note, (counts.get(note) ?? 0) + 1);
  });
  const frequent = [...counts].sort((one, other) => other[1] - one[1]);
  lines.push(...frequent.map(([note, count]) => `${note} (${count} ${count === 1 ? "row" : "rows"})`));
  const more = lines.length - 50;
  $("notes").replaceChildren(...listOf(more > 0 ? [...lines.slice(0, 50), `and ${more} more; the CSV has all`] : lines).children);
}

const quoted = (cell) => /[",\r\n]/.test(cell) ? '"' + cell.replaceAll('"', '""') + '"' : cell;
const harmless = (text) => /^[=+\-@\t\r]/.test(text) ? "'" + text : text;  // no formula that the file did not have

function offer(table, results) {
  const has = (test) => results.some(test);
  const added = {prediction: (r) => harmless(r.prediction ?? "")};
  for (const name of task.labels) added["p_" + name] = (r) => String(r.probabilities?.[name] ?? "");
  added.top2_margin = (r) => String(r.top2_margin ?? "");
  if (has((r) => r.extra?.refer !== undefined)) added.refer = (r) => String(r.extra?.refer ?? "");
  if (has((r) => r.error)) added.error = (r) => harmless(r.error ?? "");
  if (has((r) => r.extra?.notes)) added.notes = (r) => harmless((r.extra?.notes ?? []).join("; "));
  const rows = table.cells.map((cells, number) => [
    ...cells, ...Object.values(added).map((cell) => cell(results[number] ?? {}))]);
  const lines = [[...table.header, ...Object.keys(added)], ...rows];
  const text = lines.map((cells) => cells.map(quoted).join(",")).join("\r\n") + "\r\n";
  URL.revokeObjectURL($("download").href);
  $("download").href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
  $("download").download = task.name + "_scored.csv";
  $("download").hidden = false;
}

$("file").addEventListener("change", () => scoreFile($("file").files[0]));
$("decimal").addEventListener("change", () => $("file").disabled || scoreFile(lastFile));
$("stop").addEventListener("click", () => { stopped = true; });
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && !$("file").disabled) scoreFile(event.dataTransfer.files[0]);
  });
}

// ---------------------------------------------------------------- theme

const dark = () => (document.documentElement.dataset.theme
  ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const nameTheme = () => { $("theme").textContent = dark() ? "Light" : "Dark"; };
$("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  nameTheme();
});
nameTheme();
showTask();
