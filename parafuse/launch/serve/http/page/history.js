// What this key has painted, newest first. Pictures and receipts are fetched for entries that are seen.

import { file, json } from "./api.js";
import { askedOf, forget } from "./asked.js";
import { at, image, make } from "./dom.js";
import { isOver } from "./stage.js";

const PAGE = 12;
const KINDS = ["image", "edit", "video"]; // what can be looked at

export class History {
  // `opened` is given the job of an entry that was chosen, `again` one that is to be painted once more.
  constructor(model, { opened, again }) {
    Object.assign(this, { model, opened, again });
    this.jobs = new Map();
    this.entries = new Map();
    this.seen = new IntersectionObserver((found) => found.forEach((one) => one.isIntersecting && this.fill(one.target)));
  }

  get hasOpen() {
    return [...this.jobs.values()].some((job) => !isOver(job));
  }

  // The newest again, whatever of older ones is shown.
  async refresh() {
    const found = await json("GET", `v1/jobs?limit=${PAGE}`);
    const jobs = found.data.filter((job) => KINDS.includes(job.kind));
    for (const job of [...jobs].reverse()) this.put(job);
    if (!this.last || this.jobs.size <= jobs.length) this.until(found);
    return jobs;
  }

  // The oldest that was asked for: where to go on.
  until(found) {
    this.last = found.data.at(-1)?.id ?? this.last;
    at("older").hidden = !found.has_more;
  }

  async older() {
    const found = await json("GET", `v1/jobs?limit=${PAGE}&after=${encodeURIComponent(this.last)}`);
    for (const job of found.data) this.put(job, true);
    this.until(found);
    this.entries.get(found.data[0]?.id)?.querySelector(".card").focus();
  }

  // A job that is new, or stands otherwise than before.
  put(job, isOlder = false) {
    if (!KINDS.includes(job.kind)) return;
    const before = this.jobs.get(job.id);
    this.jobs.set(job.id, job);
    at("history-none").hidden = true;
    if (before?.status === job.status) return;
    const entry = this.entries.get(job.id) ?? make("li");
    if (!this.entries.has(job.id)) {
      entry.dataset.job = job.id;
      this.entries.set(job.id, entry);
      if (isOlder) at("jobs").append(entry);
      else at("jobs").prepend(entry);
    }
    this.draw(entry, job);
    this.seen.unobserve(entry);
    this.seen.observe(entry);
  }

  draw(entry, job) {
    const hadFocus = entry.contains(document.activeElement);
    const when = new Date(job.created_at * 1000);
    const card = make("button", { type: "button", className: "card" },
      make("span", { className: "thumb", textContent: job.kind === "video" ? "video" : "" }),
      make("strong", { textContent: entry.dataset.prompt ?? "…" }),
      make("small", { textContent: `${job.status} · seed ${job.seed} · ${when.toLocaleTimeString()}` }),
    );
    card.addEventListener("click", () => this.opened(this.jobs.get(job.id)));
    const again = make("button", { type: "button", textContent: "Again with this seed", hidden: true });
    again.addEventListener("click", () => this.again(this.jobs.get(job.id)));
    entry.dataset.status = job.status;
    delete entry.dataset.filled;
    entry.replaceChildren(card, again);
    this.mark(this.current);
    if (hadFocus) card.focus();
  }

  // The prompt and the picture of an entry that is seen.
  async fill(entry) {
    const job = this.jobs.get(entry.dataset.job);
    if (!job || entry.dataset.filled === job.status) return;
    entry.dataset.filled = job.status;
    const [card, again] = entry.children;
    const asked = await askedOf(job, this.model).catch(() => null);
    const prompt = asked?.prompt ?? `(a prompt of another tab; ${job.status})`;
    entry.dataset.prompt = prompt;
    card.querySelector("strong").textContent = prompt;
    again.hidden = asked === null || job.kind === "edit" || !isOver(job);
    again.setAttribute("aria-label", `Again with seed ${job.seed}: ${prompt}`);
    if (job.status !== "done" || job.kind === "video") return;
    const url = await file(job.id, 0).catch(() => null);
    if (url) card.querySelector(".thumb").replaceChildren(image(url, ""));
  }

  // Which one the stage shows.
  mark(id) {
    this.current = id;
    for (const entry of at("jobs").children) {
      entry.querySelector(".card").setAttribute("aria-current", String(entry.dataset.job === id));
    }
  }

  take(id) {
    const entry = this.entries.get(id);
    const next = entry?.nextElementSibling ?? entry?.previousElementSibling;
    entry?.remove();
    this.entries.delete(id);
    this.jobs.delete(id);
    forget(id);
    at("history-none").hidden = this.jobs.size > 0;
    (next?.querySelector(".card") ?? at("prompt")).focus();
  }
}
