// The server's API: every call with the key, every fault as one kind of error.

const KEY = "parafuse.key";
const BASE = new URL("./", location.href); // also where a proxy has the server below a path of its own

export class ApiError extends Error {
  constructor(status, { message, code = null, param = null }) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => sessionStorage.setItem(KEY, text),
  forget: () => sessionStorage.removeItem(KEY),
  // what a header can carry
  isOne: (text) => /^[\x21-\x7e]+$/.test(text),
};

async function call(method, path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  const isForm = body instanceof FormData;
  if (body !== undefined && !isForm) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(new URL(path, BASE), {
      method,
      headers,
      signal,
      body: isForm || body === undefined ? body : JSON.stringify(body),
      credentials: "omit",
      cache: "no-store",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server does not answer.", code: "no_answer" });
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new ApiError(answer.status, told.error ?? { message: `The server answered ${answer.status}.` });
}

export const json = async (method, path, options) => (await call(method, path, options)).json();

// What a file holds, as a URL that a picture can have: the key is in no address.
export const file = async (job, number) =>
  URL.createObjectURL(await (await call("GET", `v1/files/${encodeURIComponent(job)}/${number}`)).blob());

export const receipt = (job) => json("GET", `v1/receipts/${encodeURIComponent(job)}`);

// A job's events, each {name, data}, until the server ends them or `signal` does.
export async function* events(job, signal) {
  const answer = await call("GET", `v1/jobs/${encodeURIComponent(job)}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { message: "The line to the server broke.", code: "no_answer" });
    }
    if (piece.done) return;
    const parts = (rest + piece.value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").map((line) => line.replace(/\r$/, ""));
      const of = (name) => lines.filter((line) => line.startsWith(name)).map((line) => line.slice(name.length).trimStart());
      const data = of("data:").join("\n");
      if (data) yield { name: of("event:")[0] ?? "message", data: JSON.parse(data) };
    }
  }
}
