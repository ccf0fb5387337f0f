// What a job was asked for: from its receipt, or, where it has none yet, from what this tab has sent.

import { json, receipt } from "./api.js";

const SENT = "parafuse.sent";
const MOST = 50;
const receipts = new Map();

const sent = () => JSON.parse(sessionStorage.getItem(SENT) ?? "{}");

export function remember(job, body) {
  const kept = Object.entries({ ...sent(), [job]: body }).slice(-MOST);
  sessionStorage.setItem(SENT, JSON.stringify(Object.fromEntries(kept)));
}

export function forget(job) {
  receipts.delete(job);
  const { [job]: _, ...kept } = sent();
  sessionStorage.setItem(SENT, JSON.stringify(kept));
}

// null where there is none: of a job that did not come to its end.
export async function receiptOf(job) {
  if (job.status !== "done") return null;
  if (!receipts.has(job.id)) {
    receipts.set(job.id, await receipt(job.id).catch(() => null));
  }
  return receipts.get(job.id);
}

// The body of the request that paints the same again; null where nothing is known of it.
export async function askedOf(job, model) {
  const found = await receiptOf(job);
  const before = sent()[job.id];
  if (!found) return before ? { ...before, seed: job.seed } : null;
  const said = found.call ?? {};
  const body = { prompt: said.prompt ?? "", seed: job.seed };
  for (const [field, keywords] of Object.entries(model.takes)) {
    const values = keywords.map((keyword) => said[keyword]);
    if (values.some((value) => value === undefined || value === null)) continue;
    body[field] = field === "size" ? values.join("x") : values[0];
  }
  const lora = (found.lora ?? []).map(({ name, scale }) => ({ name, scale }));
  if (lora.length) body.lora = lora;
  if (job.n > 1) body.n = job.n;
  if (job.kind === "video") {
    const told = await json("GET", `v1/videos/${encodeURIComponent(job.id)}`);
    if (body.frames > 1 && Number(told.seconds)) body.fps = Math.round((body.frames - 1) / Number(told.seconds));
  }
  return body;
}
