// The server's API as the page uses it: one request that streams, and the grapheme clusters of what comes.

/** Ask for an answer. Yields each chunk of the event stream as an object; throws Error with the server's reason. */
export async function* ask(body, { key, signal }) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers, signal,
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  if (!response.ok) throw new Error(await reason(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    pending += value;
    const events = pending.split("\n\n");
    pending = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

/** The name of the server's model. */
export async function modelName(key) {
  const response = await fetch("/v1/models", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
  if (!response.ok) throw new Error(await reason(response));
  return (await response.json()).data[0].id;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

const clusters = new Intl.Segmenter(undefined, { granularity: "grapheme" });

/** Characters are no longer than this. */
export const NEAR = 64;

/** Where a piece of a text may end: here, or after the character (flag, joined emoji, accent) that reaches across. */
export function boundary(text, end) {
  if (end <= 0 || end >= text.length) return Math.min(Math.max(end, 0), text.length);
  const from = Math.max(0, end - NEAR);
  const found = clusters.segment(text.slice(from, end + NEAR)).containing(end - from);
  return from + found.index === end ? end : from + found.index + found.segment.length;
}
