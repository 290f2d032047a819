// One answer on the page: its text with every block visible, its plot, its figures. Text enters the page as text only.

import { boundary, NEAR } from "./client.js";
import { element, parse, render } from "./markdown.js";

const SVG = "http://www.w3.org/2000/svg";

export class Answer {
  /** `request` is the body that was sent; `title` heads the column when there are two. */
  constructor(request, title = "") {
    this.request = request;
    this.plain = request.orthrus?.mode === "ar";
    this.events = [];
    this.node = element("div", "column writing");
    if (title) this.node.append(element("h3", "", title));
    this.thinking = element("details", "thinking");
    this.thinking.open = true;
    this.thinking.append(element("summary", "", "Thinking"), element("div"));
    this.thinking.hidden = true;
    this.body = element("div", "answer");
    this.plot = element("div", "plot");
    this.plot.hidden = true;
    this.facts = element("div", "facts");
    this.node.append(this.thinking, this.body, this.plot, this.facts);
    this.reset();
  }

  reset() {
    this.text = "";
    this.thought = "";
    this.calls = [];
    this.pieces = [];
    this.cycles = [];
    this.tokens = this.forwards = 0;
    this.reason = null;
    this.stats = null;
    this.drawn = [];
    this.body.replaceChildren();
    this.node.classList.add("writing");
  }

  /** Take one chunk that came so many milliseconds after the question. */
  take(chunk, at) {
    this.events.push({ chunk, at });
    this.add(chunk, at);
  }

  add(chunk, at) {
    this.at = at;
    if (chunk.usage) this.stats = chunk.usage.orthrus;
    const choice = chunk.choices[0];
    if (!choice) return;
    this.reason = choice.finish_reason ?? this.reason;
    if (choice.delta.reasoning_content) this.thought += choice.delta.reasoning_content;
    for (const call of choice.delta.tool_calls ?? []) {
      const made = (this.calls[call.index] ??= { name: "", arguments: "" });
      made.name += call.function?.name ?? "";
      made.arguments += call.function?.arguments ?? "";
    }
    const block = chunk.orthrus;
    if (block) {
      this.cycles[block.cycle] = { accepted: block.accepted, drafted: block.drafted, emitted: block.emitted };
      this.tokens += block.emitted;
      this.forwards = block.forwards;
      for (const piece of block.pieces) this.append(piece.text, piece.cycle, piece.source);
    } else if (choice.delta.content) this.append(choice.delta.content, 0, "bonus");
  }

  append(text, cycle, source) {
    this.text += text;
    this.pieces.push({ start: 0, end: 0, to: this.text.length, cycle, source });
    // What has come now may belong to the characters that earlier pieces ended with.
    let first = this.pieces.length - 1;
    while (first > 0 && this.pieces[first - 1].to > this.text.length - NEAR) first -= 1;
    for (let i = first; i < this.pieces.length; i += 1) {
      this.pieces[i].start = i ? this.pieces[i - 1].end : 0;
      this.pieces[i].end = boundary(this.text, this.pieces[i].to);
    }
  }

  /** Show what has come; blocks of text that are complete stay as they are. */
  draw() {
    if (this.thought) {
      this.thinking.hidden = false;
      this.thinking.lastChild.textContent = this.thought;
    }
    const blocks = parse(this.text);
    let same = 0;
    while (same < this.drawn.length - 1 && same < blocks.length && alike(this.drawn[same], blocks[same])) same += 1;
    for (const old of this.drawn.slice(same)) old.node.remove();
    this.drawn = [
      ...this.drawn.slice(0, same),
      ...blocks.slice(same).map((block) => ({ ...block, node: render(this.text, block, (s, e) => this.leaf(s, e)) })),
    ];
    this.body.append(...this.drawn.slice(same).map((block) => block.node));
    for (const old of this.body.querySelectorAll(".call")) old.remove();
    for (const call of this.calls) this.body.append(element("div", "call", `${call.name}(${call.arguments})`));
  }

  /** The text from start to end, in spans of their cycle and source. */
  leaf(start, end) {
    const made = document.createDocumentFragment();
    if (this.plain) {
      made.append(this.text.slice(start, end));
      return made;
    }
    let low = 0;
    let high = this.pieces.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.pieces[middle].end <= start) low = middle + 1;
      else high = middle;
    }
    for (let i = low; i < this.pieces.length && this.pieces[i].start < end; i += 1) {
      const piece = this.pieces[i];
      const text = this.text.slice(Math.max(start, piece.start), Math.min(end, piece.end));
      if (!text) continue;
      const span = element("span", piece.source, text);
      span.dataset.cycle = piece.cycle;
      made.append(span);
    }
    return made;
  }

  /** No more will come: show the figures and the plot, with buttons below. */
  finish(buttons = []) {
    this.draw();
    this.node.classList.remove("writing");
    if (this.thought && this.text) this.thinking.open = false;
    const drafted = this.cycles.some((cycle) => cycle.drafted);
    this.plot.hidden = !drafted || this.plain;
    if (!this.plot.hidden) {
      const kept = this.cycles.reduce((sum, cycle) => sum + cycle.accepted, 0);
      const svg = bars(document.createElementNS(SVG, "svg"), this.cycles, 34);
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", `Accepted drafts per cycle: ${kept} in ${this.cycles.length - 1} cycles`);
      this.plot.replaceChildren(svg);
    }
    const facts = [
      [this.tokens, "tokens"],
      [this.perPass.toFixed(2), "per pass"],
      [this.speed.toFixed(0), "tokens/s"],
      [(this.at / 1000).toFixed(2), "s"],
    ].map(([figure, name]) => {
      const made = element("span");
      made.append(element("b", "", String(figure)), ` ${name}`);
      return made;
    });
    if (this.reason === "length") facts.push(element("span", "", "cut at the longest answer"));
    if (this.reason === "stopped") facts.push(element("span", "", "stopped"));
    const tools = element("span", "tools");
    tools.append(...buttons);
    this.facts.replaceChildren(...(this.tokens ? facts : []), ...(buttons.length ? [tools] : []));
  }

  get perPass() {
    const forwards = this.stats?.forwards ?? this.forwards;
    return forwards ? this.tokens / forwards : 0;
  }

  get speed() {
    return this.at ? (this.tokens / this.at) * 1000 : 0;
  }

  /** What a cycle did, in words. */
  about(number) {
    const cycle = this.cycles[number];
    if (!cycle) return "";
    const wrote = `${cycle.emitted} token${cycle.emitted === 1 ? "" : "s"}`;
    if (!number) return `Prompt · ${wrote}`;
    if (!cycle.drafted) return `Cycle ${number} · no drafts · ${wrote}`;
    return `Cycle ${number} · ${cycle.accepted} of ${cycle.drafted} drafts kept · ${wrote}`;
  }
}

/** Draw accepted drafts per cycle: the room a block has, what was kept of it, the model's own token on top. */
export function bars(svg, cycles, height, wide = Infinity) {
  const width = 5;
  const gap = 2;
  const last = Math.max(1, Math.floor(wide / (width + gap)));
  const shown = Object.keys(cycles).slice(-last);
  const most = Math.max(1, ...Object.values(cycles).map((cycle) => Math.max(cycle.drafted, cycle.emitted))) + 1;
  const unit = (height - 1) / most;
  const made = shown.map((number, index) => {
    const { accepted, drafted, emitted } = cycles[number];
    const group = document.createElementNS(SVG, "g");
    group.dataset.cycle = number;
    const rect = (name, from, count) => {
      const drawn = document.createElementNS(SVG, "rect");
      const tall = Math.max(count * unit, count ? 1.5 : 0);
      for (const [key, value] of Object.entries({ x: index * (width + gap), y: height - from * unit - tall, width, height: tall, rx: 1 }))
        drawn.setAttribute(key, value.toFixed?.(2) ?? value);
      if (name) drawn.setAttribute("class", name);
      group.append(drawn);
    };
    rect("room", 0, Math.max(drafted + 1, emitted));
    if (accepted) rect("", 0, accepted);
    if (emitted > accepted) rect("own", accepted, emitted - accepted);
    return group;
  });
  svg.setAttribute("class", "bars");
  svg.setAttribute("height", height);
  svg.setAttribute("width", Math.max(shown.length * (width + gap), 1));
  svg.replaceChildren(...made);
  return svg;
}

function alike(one, other) {
  return one.type === other.type && one.start === other.start && one.end === other.end && one.last === other.last;
}
