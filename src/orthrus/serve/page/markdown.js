// Markdown to DOM nodes. Every piece of text keeps its place in the source: `leaf(start, end)` makes the node for
// source[start:end], so that the caller can colour it. Nothing here ever reads text as HTML.

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const DELIMITER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const SAFE_LINK = /^(?:https?:\/\/|mailto:)/i;

/** Split a text into its top-level blocks: [{type, start, end, …}]. */
export function parse(source) {
  const lines = [];
  for (let start = 0; start <= source.length; ) {
    const newline = source.indexOf("\n", start);
    const end = newline < 0 ? source.length : newline;
    lines.push({ start, end });
    start = end + 1;
    if (newline < 0) break;
  }
  return blocks(source, lines);
}

/** Make the element of one block. */
export function render(source, block, leaf) {
  const inline = (parent, start, end) => spans(source, start, end, leaf, parent);
  const children = (parent, list) => parent.append(...list.map((child) => render(source, child, leaf)));
  switch (block.type) {
    case "heading": {
      const made = element(`h${Math.min(block.level + 1, 6)}`);
      inline(made, block.text.start, block.text.end);
      return made;
    }
    case "rule":
      return element("hr");
    case "code": {
      const made = element("figure", "code");
      const head = element("figcaption");
      head.append(element("span", "", block.language || "code"));
      const copy = element("button", "quiet copy", "Copy");
      copy.type = "button";
      head.append(copy);
      const code = element("code");
      for (const line of block.lines) code.append(leaf(line.start, Math.min(line.end + 1, block.end)));
      const pre = element("pre");
      pre.append(code);
      pre.tabIndex = 0;
      made.append(head, pre);
      made.dir = "ltr";
      return made;
    }
    case "quote": {
      const made = element("blockquote");
      children(made, block.children);
      return made;
    }
    case "list": {
      const made = element(block.ordered ? "ol" : "ul");
      if (block.ordered && block.first !== 1) made.start = block.first;
      for (const item of block.items) {
        const li = element("li");
        for (const child of item) {
          if (child.type === "paragraph" && item.filter((c) => c.type === "paragraph").length === 1)
            paragraph(source, child, leaf, li);
          else li.append(render(source, child, leaf));
        }
        made.append(li);
      }
      made.dir = "auto";
      return made;
    }
    case "table": {
      const table = element("table");
      block.rows.forEach((row, index) => {
        const tr = element("tr");
        for (const cell of row) {
          const td = element(index ? "td" : "th");
          inline(td, cell.start, cell.end);
          tr.append(td);
        }
        table.append(tr);
      });
      const made = element("div", "table");
      made.append(table);
      made.dir = "auto";
      return made;
    }
    default: {
      const made = element("p");
      made.dir = "auto";
      paragraph(source, block, leaf, made);
      return made;
    }
  }
}

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function paragraph(source, block, leaf, parent) {
  block.lines.forEach((line, index) => {
    if (index) parent.append(element("br"));
    spans(source, line.start, line.end, leaf, parent);
  });
}

function blocks(source, lines) {
  const found = [];
  const text = (line) => source.slice(line.start, line.end);
  const blank = (line) => !text(line).trim();
  const opens = (line) => {
    const t = text(line);
    return FENCE.test(t) || HEADING.test(t) || RULE.test(t) || QUOTE.test(t) || ITEM.test(t);
  };
  let i = 0;
  while (i < lines.length) {
    const first = lines[i];
    const t = text(first);
    if (blank(first)) {
      i += 1;
      continue;
    }
    let match = FENCE.exec(t);
    if (match) {
      const closing = new RegExp(`^ {0,3}${match[1][0]}{${match[1].length},}[ \\t]*$`);
      let j = i + 1;
      while (j < lines.length && !closing.test(text(lines[j]))) j += 1;
      const body = lines.slice(i + 1, j);
      const closed = j < lines.length;
      const end = body.length ? body[body.length - 1].end : first.end;
      found.push({
        type: "code", language: match[2], lines: body, start: first.start,
        end: closed ? lines[j].start : end, last: closed ? lines[j].end : end,
      });
      i = closed ? j + 1 : j;
      continue;
    }
    match = HEADING.exec(t);
    if (match) {
      found.push({
        type: "heading", level: match[1].length, start: first.start, end: first.end,
        text: { start: first.start + match[0].length, end: first.end },
      });
      i += 1;
      continue;
    }
    if (RULE.test(t)) {
      found.push({ type: "rule", start: first.start, end: first.end });
      i += 1;
      continue;
    }
    if (QUOTE.test(t)) {
      const inner = [];
      let j = i;
      for (; j < lines.length && (QUOTE.test(text(lines[j])) || (!blank(lines[j]) && !opens(lines[j]))); j += 1) {
        const cut = QUOTE.exec(text(lines[j]));
        inner.push({ start: lines[j].start + (cut ? cut[0].length : 0), end: lines[j].end });
      }
      found.push({ type: "quote", children: blocks(source, inner), start: first.start, end: lines[j - 1].end });
      i = j;
      continue;
    }
    match = ITEM.exec(t);
    if (match) {
      const [block, next] = list(source, lines, i, match);
      found.push(block);
      i = next;
      continue;
    }
    if (t.includes("|") && i + 1 < lines.length && DELIMITER.test(text(lines[i + 1])) && text(lines[i + 1]).includes("-")) {
      const rows = [cells(source, first)];
      let j = i + 2;
      for (; j < lines.length && !blank(lines[j]) && text(lines[j]).includes("|"); j += 1) rows.push(cells(source, lines[j]));
      found.push({ type: "table", rows, start: first.start, end: lines[j - 1].end });
      i = j;
      continue;
    }
    let j = i + 1;
    while (j < lines.length && !blank(lines[j]) && !opens(lines[j])) j += 1;
    found.push({ type: "paragraph", lines: lines.slice(i, j), start: first.start, end: lines[j - 1].end });
    i = j;
  }
  return found;
}

function list(source, lines, from, match) {
  const ordered = /\d/.test(match[2]);
  const same = (m) => m && /\d/.test(m[2]) === ordered;
  const items = [];
  let i = from;
  while (i < lines.length) {
    const found = ITEM.exec(source.slice(lines[i].start, lines[i].end));
    if (!same(found) || RULE.test(source.slice(lines[i].start, lines[i].end))) break;
    const width = found[0].length || 2;
    const inner = [{ start: lines[i].start + found[0].length, end: lines[i].end }];
    let j = i + 1;
    for (; j < lines.length; j += 1) {
      const t = source.slice(lines[j].start, lines[j].end);
      if (!t.trim()) {
        const next = lines[j + 1];
        if (next && /^ {2,}\S/.test(source.slice(next.start, next.end))) {
          inner.push(lines[j]);
          continue;
        }
        break;
      }
      const indent = t.length - t.trimStart().length;
      if (indent >= Math.min(width, 2)) inner.push({ start: lines[j].start + Math.min(indent, width), end: lines[j].end });
      else if (!ITEM.test(t) && !FENCE.test(t) && !HEADING.test(t) && !QUOTE.test(t)) inner.push(lines[j]);
      else break;
    }
    items.push(blocks(source, inner));
    i = j;
    while (i < lines.length && !source.slice(lines[i].start, lines[i].end).trim()) {
      const next = lines[i + 1];
      if (!next || !same(ITEM.exec(source.slice(next.start, next.end)))) break;
      i += 1;
    }
  }
  const block = { type: "list", ordered, first: parseInt(match[2], 10), items, start: lines[from].start, end: lines[i - 1].end };
  return [block, i];
}

function cells(source, line) {
  let { start, end } = line;
  while (start < end && /\s/.test(source[start])) start += 1;
  while (end > start && /\s/.test(source[end - 1])) end -= 1;
  if (source[start] === "|") start += 1;
  if (end > start && source[end - 1] === "|") end -= 1;
  const found = [];
  for (let at = start; at <= end; at += 1) {
    if (at === end || (source[at] === "|" && source[at - 1] !== "\\")) {
      found.push(trimmed(source, start, at));
      start = at + 1;
    }
  }
  return found;
}

function trimmed(source, start, end) {
  while (start < end && /\s/.test(source[start])) start += 1;
  while (end > start && /\s/.test(source[end - 1])) end -= 1;
  return { start, end };
}

const INLINE = [
  { open: /^(`+)/, make: code },
  { open: /^(\*\*|__)(?=\S)/, make: (...a) => enclosed("strong", ...a) },
  { open: /^(~~)(?=\S)/, make: (...a) => enclosed("del", ...a) },
  { open: /^(\*|_)(?=\S)/, make: (...a) => enclosed("em", ...a) },
  { open: /^(!?\[)/, make: link },
  { open: /^(https?:\/\/[^\s<>)\]]*[^\s<>)\].,;:!?'"])/, make: bare },
];

function spans(source, start, end, leaf, parent) {
  let plain = start;
  let at = start;
  const flush = (to) => {
    if (to > plain) parent.append(leaf(plain, to));
  };
  while (at < end) {
    if (source[at] === "\\" && at + 1 < end && /[!-/:-@[-`{-~]/.test(source[at + 1])) {
      flush(at);
      plain = at + 1;
      at += 2;
      continue;
    }
    const rest = source.slice(at, end);
    let made = null;
    for (const { open, make } of INLINE) {
      const match = open.exec(rest);
      if (match && !(match[1][0] === "_" && /\w/.test(source[at - 1] ?? " "))) made = make(source, at, end, match[1], leaf);
      if (match) break;
    }
    if (made) {
      flush(at);
      parent.append(made.node);
      at = plain = made.next;
    } else at += /^[`*_~]+/.exec(rest)?.[0].length ?? 1;
  }
  flush(end);
}

function code(source, at, end, mark, leaf) {
  for (let close = at + mark.length; close < end; ) {
    close = source.indexOf(mark, close);
    if (close < 0 || close >= end) return null;
    let run = mark.length;
    while (source[close + run] === "`") run += 1;
    if (run === mark.length) {
      const node = element("code");
      node.append(leaf(at + mark.length, close));
      return { node, next: close + run };
    }
    close += run;
  }
  return null;
}

function enclosed(name, source, at, end, mark, leaf) {
  for (let close = at + mark.length + 1; close < end; close += 1) {
    close = source.indexOf(mark, close);
    if (close < 0 || close + mark.length > end) return null;
    const within = mark[0] === "_" && /\w/.test(source[close + mark.length] ?? " ");
    const longer = mark.length === 1 && (source[close + 1] === mark || source[close - 1] === mark);
    if (/\S/.test(source[close - 1]) && !within && !longer) {
      const node = element(name);
      spans(source, at + mark.length, close, leaf, node);
      return { node, next: close + mark.length };
    }
  }
  return null;
}

function link(source, at, end, mark, leaf) {
  const match = /^!?\[([^\]\n]*)\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)/.exec(source.slice(at, end));
  if (!match || !SAFE_LINK.test(match[2])) return null;
  const node = anchor(match[2]);
  const from = at + mark.length;
  if (match[1]) spans(source, from, from + match[1].length, leaf, node);
  else node.append(match[2]);
  return { node, next: at + match[0].length };
}

function bare(source, at, _end, url, leaf) {
  const node = anchor(url);
  node.append(leaf(at, at + url.length));
  return { node, next: at + url.length };
}

function anchor(url) {
  const made = element("a");
  made.href = url;
  made.target = "_blank";
  made.rel = "noopener noreferrer";
  return made;
}
