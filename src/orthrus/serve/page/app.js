// The page: a conversation, its keys and its settings. What an answer looks like is answer.js' part.

import { Answer, bars } from "./answer.js";
import { ask, modelName } from "./client.js";
import { element } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = [
  "What is 17 + 25? Explain step by step.",
  "Write a Python function that reverses a list.",
  "Describe a bookshop as a JSON object.",
  "Why is the sky blue?",
];
const KEPT = ["system", "temperature", "top_p", "max_tokens", "seed", "mode", "theme"];
const calm = matchMedia("(prefers-reduced-motion: reduce)");

let model = "";
let turns = []; // {said, answer, node, columns}
let running = null; // {controller, answer}
let settings = { system: "", temperature: "0", top_p: "", max_tokens: "1024", seed: "", mode: "orthrus", theme: "" };

// ---------------------------------------------------------------- asking

function body(said, earlier) {
  const messages = [];
  if (settings.system.trim()) messages.push({ role: "system", content: settings.system });
  for (const turn of earlier)
    messages.push({ role: "user", content: turn.said }, { role: "assistant", content: turn.answer.text });
  messages.push({ role: "user", content: said });
  const made = { model, messages, orthrus: { mode: settings.mode, blocks: true } };
  const temperature = Number(settings.temperature) || 0;
  made.temperature = temperature;
  if (temperature && settings.top_p) made.top_p = Number(settings.top_p);
  if (settings.max_tokens) made.max_tokens = Number(settings.max_tokens);
  made.seed = settings.seed === "" ? Math.floor(Math.random() * 2 ** 31) : Number(settings.seed);
  return made;
}

async function send(said) {
  if (running || !said.trim()) return;
  const earlier = turns.filter((turn) => turn.answer.text);
  $("welcome").hidden = true;
  const node = element("section", "turn");
  const user = element("div", "user");
  const bubble = element("div", "said", said);
  bubble.dir = "auto";
  user.append(bubble);
  const columns = element("div", "columns");
  node.append(user, columns);
  const answer = new Answer(body(said, earlier));
  columns.append(answer.node);
  $("log").append(node);
  for (const turn of turns) turn.again?.remove();
  const turn = { said, answer, node, columns };
  turns.push(turn);
  bottom(true);
  await stream(answer);
  answer.finish(buttons(turn));
  bottom();
}

/** Let an answer be written; returns whether it came to its own end. */
async function stream(answer) {
  const controller = new AbortController();
  running = { controller, answer };
  writing(true);
  const started = performance.now();
  let frame = 0;
  const draw = () => {
    frame = 0;
    const follows = nearBottom();
    answer.draw();
    meter(answer);
    if (follows) bottom(true);
  };
  let well = true;
  try {
    for await (const chunk of ask(answer.request, { key: key(), signal: controller.signal })) {
      answer.take(chunk, performance.now() - started);
      frame ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    well = false;
    if (controller.signal.aborted) answer.reason = "stopped";
    else answer.node.append(element("p", "problem", error.message));
  }
  cancelAnimationFrame(frame);
  draw();
  running = null;
  writing(false);
  $("status").textContent = well ? `Answer of ${answer.tokens} tokens complete` : "Answer ended early";
  return well;
}

function stop() {
  running?.controller.abort();
}

function regenerate(turn) {
  if (running || turns[turns.length - 1] !== turn) return;
  turns.pop();
  turn.node.remove();
  send(turn.said);
}

/** Decode the same question plainly beside the drafted answer, which is shown again at the pace it came. */
async function compare(turn) {
  if (running) return;
  const { answer, columns } = turn;
  const request = { ...answer.request, orthrus: { mode: "ar", blocks: true } };
  if (answer.reason === "stopped") request.max_tokens = answer.tokens;
  const other = new Answer(request, "Plain decoding");
  columns.replaceChildren(answer.node, other.node);
  columns.classList.add("two");
  turn.node.querySelector(".verdict")?.remove();
  if (!answer.node.querySelector("h3")) answer.node.prepend(element("h3", "", "Drafted"));
  answer.facts.replaceChildren();
  answer.plot.hidden = true;
  const ends = new AbortController();
  const shown = replay(answer, ends.signal);
  const well = await stream(other);
  if (!well) ends.abort();
  await shown;
  answer.finish(buttons(turn));
  other.finish();
  if (well) turn.node.append(verdict(answer, other));
  bottom();
}

async function replay(answer, signal) {
  const events = answer.events;
  const reason = answer.reason;
  if (!calm.matches) {
    answer.reset();
    const started = performance.now();
    for (const { chunk, at } of events) {
      const wait = at - (performance.now() - started);
      if (wait > 0 && !signal.aborted) await new Promise((done) => setTimeout(done, wait));
      answer.add(chunk, at);
      answer.draw();
    }
  }
  answer.reason = reason;
  answer.node.classList.remove("writing");
}

function verdict(answer, other) {
  const made = element("p", "verdict");
  const same = answer.reason === "stopped" ? other.text.startsWith(answer.text) : answer.text === other.text;
  const ratio = other.at / answer.at;
  made.append(element("b", "", same ? "The same text" : "Different texts"));
  if (!same) made.append(answer.request.temperature ? " (sampled)" : " (please report this)");
  made.append(` · drafted ${(answer.at / 1000).toFixed(2)} s, plain ${(other.at / 1000).toFixed(2)} s · `);
  made.append(element("b", "", `${ratio.toFixed(1)} times the speed`));
  return made;
}

function buttons(turn) {
  const button = (name, title, act) => {
    const made = element("button", "quiet", name);
    made.type = "button";
    made.title = title;
    made.addEventListener("click", act);
    return made;
  };
  const made = [button("Copy", "Copy the answer", (event) => copy(event.target, turn.answer.text))];
  turn.again = button("Regenerate", "Ask again (Alt+R)", () => regenerate(turn));
  if (turns[turns.length - 1] === turn) made.push(turn.again);
  if (!turn.answer.plain && turn.answer.tokens)
    made.push(button("Compare", "Decode the same plainly, side by side", () => compare(turn)));
  return made;
}

async function copy(button, text) {
  await navigator.clipboard.writeText(text);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1200);
}

// ---------------------------------------------------------------- the page

function meter(answer) {
  $("meter").hidden = false;
  $("speed").textContent = answer.speed.toFixed(0);
  $("per-pass").textContent = answer.perPass.toFixed(2);
  $("count").textContent = answer.tokens;
  $("live").replaceChildren();
  if (!answer.plain) bars($("live"), answer.cycles, 26, $("live").clientWidth || 300);
}

function writing(now) {
  $("send").textContent = now ? "Stop" : "Send";
  $("send").setAttribute("aria-label", now ? "Stop" : "Send");
  $("send").classList.toggle("stop", now);
  $("send").classList.toggle("primary", !now);
}

function nearBottom() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 120;
}

function bottom(always = false) {
  if (always || nearBottom()) $("log").scrollTop = $("log").scrollHeight;
}

function grow() {
  const text = $("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
}

function fresh() {
  stop();
  for (const turn of turns) turn.node.remove();
  turns = [];
  $("welcome").hidden = false;
  $("meter").hidden = true;
  $("text").focus();
}

/** Light up a cycle in text and plot, and say what it did. */
function hover(event) {
  const at = event.target.closest?.("[data-cycle]");
  const column = at?.closest(".column");
  for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
  const answer = column && [...turns.map((turn) => turn.answer)].find((one) => one.node === column);
  $("tip").hidden = !answer || (!document.body.classList.contains("blocks") && !at.closest("svg"));
  if ($("tip").hidden) return;
  for (const same of column.querySelectorAll(`[data-cycle="${at.dataset.cycle}"]`)) same.classList.add("lit");
  $("tip").textContent = answer.about(Number(at.dataset.cycle));
  const width = $("tip").offsetWidth;
  $("tip").style.left = `${Math.max(8, Math.min(event.clientX - width / 2, innerWidth - width - 8))}px`;
  $("tip").style.top = `${event.clientY > 70 ? event.clientY - 46 : event.clientY + 24}px`;
}

// ---------------------------------------------------------------- settings

function key() {
  return sessionStorage.getItem("orthrus-key") ?? "";
}

function load() {
  try {
    settings = { ...settings, ...JSON.parse(localStorage.getItem("orthrus-settings") ?? "{}") };
  } catch {
    // Settings that cannot be read are the defaults.
  }
  for (const name of KEPT) $(`set-${name}`).value = settings[name];
  $("set-key").value = key();
  apply();
}

function save() {
  for (const name of KEPT) settings[name] = $(`set-${name}`).value;
  localStorage.setItem("orthrus-settings", JSON.stringify(settings));
  sessionStorage.setItem("orthrus-key", $("set-key").value);
  apply();
}

function apply() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}

async function meet() {
  try {
    model = await modelName(key());
    $("model").textContent = model;
    $("model").title = model;
    $("status").textContent = "";
    document.querySelector("#welcome .problem")?.remove();
  } catch (error) {
    document.querySelector("#welcome .problem")?.remove();
    $("welcome").append(element("p", "problem", error.message));
  }
}

// ---------------------------------------------------------------- what is pressed

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return stop();
  const said = $("text").value;
  if (!said.trim()) return;
  $("text").value = "";
  grow();
  send(said);
});
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("composer").requestSubmit();
  }
});
$("fresh").addEventListener("click", fresh);
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("close", () => {
  save();
  meet();
});
$("settings").addEventListener("click", (event) => {
  if (event.target === $("settings")) $("settings").close();
});
$("blocks").addEventListener("change", () => document.body.classList.toggle("blocks", $("blocks").checked));
$("log").addEventListener("pointermove", hover);
$("log").addEventListener("pointerleave", hover);
$("log").addEventListener("click", (event) => {
  if (event.target.matches(".copy")) copy(event.target, event.target.closest("figure").querySelector("code").textContent);
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches?.("input, textarea, select");
  if (event.key === "Escape" && running) stop();
  else if (event.key === "/" && !typing && !$("settings").open) {
    event.preventDefault();
    $("text").focus();
  } else if (event.altKey && !event.ctrlKey && !event.metaKey) {
    const act = {
      KeyN: fresh,
      KeyS: () => $("settings").showModal(),
      KeyB: () => $("blocks").click(),
      KeyR: () => turns.length && regenerate(turns[turns.length - 1]),
    }[event.code];
    if (act && !$("settings").open) {
      event.preventDefault();
      act();
    }
  }
});

for (const example of EXAMPLES) {
  const made = element("button", "", example);
  made.type = "button";
  made.addEventListener("click", () => send(example));
  $("examples").append(made);
}
load();
meet();
