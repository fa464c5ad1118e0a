// The studio's API: one POST, then a stream of events.

export class Busy extends Error {}

// Calls a function; yields what it yields, and last what it returns.
export async function* call(name, args, signal) {
  let answer;
  try {
    answer = await fetch(`gradio_api/call/${name}`, {
      method: "POST", signal, headers: { "content-type": "application/json" }, body: JSON.stringify({ data: args }),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the studio does not answer: is it still running?");
  }
  if (answer.status === 503) throw new Busy("busy: too many are waiting; try again in a moment");
  const reply = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(reply.error || `the studio refused this (${answer.status})`);
  const stream = await fetch(`gradio_api/call/${name}/${reply.event_id}`, { signal });
  for await (const { event, data } of events(stream)) {
    if (event === "generating" || event === "complete") yield data?.[0];
    if (event === "complete") return;
    if (event === "error") throw new Error(data?.error || data || "this failed in the studio; its log says more");
  }
  throw new Error("the studio broke off: is it still running?");
}

// Calls a function and returns its result.
export async function ask(name, ...args) {
  let last;
  for await (last of call(name, args));
  return last;
}

async function* events(stream) {
  const reader = stream.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const lines = Object.fromEntries(text.slice(0, end).split("\n").map((line) => {
        const colon = line.indexOf(": ");
        return [line.slice(0, colon), line.slice(colon + 2)];
      }));
      if (lines.event) yield { event: lines.event, data: lines.data ? JSON.parse(lines.data) : null };
    }
  }
}
