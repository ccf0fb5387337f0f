// One job as it is painted: progress, previews, what came of it, and what can be done with it.

import { ApiError, events, file, json } from "./api.js";
import { askedOf, receiptOf } from "./asked.js";
import { at, image, make, pictureOf, say, seconds, tell } from "./dom.js";

const AGAIN_MS = 1000; // before a line that broke is tried again
const TITLES = {
  queued: "Waiting", running: "Painting", done: "Done", failed: "It failed", cancelled: "Cancelled",
};
const OVER = ["done", "failed", "cancelled"];
export const isOver = (job) => OVER.includes(job.status);

export class Stage {
  constructor(model, changed) {
    this.model = model;
    this.changed = changed; // told of each new state of the job that is shown
    this.job = null;
    this.leaves = new AbortController();
    this.urls = [];
  }

  // Shows a job from now on, as it is and as it goes on.
  async show(job) {
    this.leaves.abort();
    this.leaves = new AbortController();
    const { signal } = this.leaves;
    this.clear();
    this.job = job;
    this.told = -1;
    this.state(job);
    this.words(job, signal);
    if (isOver(job)) return this.finished(job, signal);
    if (job.cancel_asked) this.ending();
    try {
      await this.follow(job, signal);
    } catch (error) {
      if (!signal.aborted) throw error;
    }
  }

  clear() {
    this.urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
    for (const id of ["preview", "outputs", "stage-prompt", "receipt-text"]) at(id).replaceChildren();
    at("receipt").hidden = true;
    at("receipt").open = false;
    at("cancel").disabled = false;
  }

  leave() {
    this.leaves.abort();
    this.clear();
    this.job = null;
    at("stage").dataset.state = "idle";
    at("stage-title").textContent = "Nothing painted yet";
    at("how").textContent = "";
    for (const id of ["progress", "cancel", "again", "reuse", "remove"]) at(id).hidden = true;
  }

  // Its events until it is over. A line that breaks is taken up again: the job goes on without it.
  async follow(job, signal) {
    while (!signal.aborted) {
      try {
        for await (const { name, data } of events(job.id, signal)) {
          if (signal.aborted) return;
          if (name === "progress") this.progress(data);
          else if (name === "preview") this.preview(data);
          else if (OVER.includes(name)) return await this.ended(data, signal);
          else if (name === "error") throw new ApiError(503, data.error);
        }
      } catch (error) {
        if (signal.aborted) return;
        if (!(error instanceof ApiError)) throw error;
        if (error.status === 404) return this.gone();
        if (error.status === 401) throw error;
        at("how").textContent = `${error.message} Trying again.`;
      }
      await new Promise((done) => setTimeout(done, AGAIN_MS));
    }
  }

  gone() {
    this.leave();
    say("The job was deleted.");
    this.changed(null);
  }

  async ended(job, signal) {
    this.job = job;
    this.state(job);
    this.changed(job);
    this.words(job, signal);
    await this.finished(job, signal);
  }

  state(job) {
    at("stage").dataset.state = job.status;
    at("stage-title").textContent = TITLES[job.status];
    at("how").textContent = this.how(job);
    const over = isOver(job);
    at("progress").hidden = over;
    if (job.status === "running" && job.progress > 0) at("progress").value = job.progress;
    else at("progress").removeAttribute("value");
    at("cancel").hidden = over;
    for (const id of ["again", "reuse", "remove"]) at(id).hidden = !over;
    at("again").textContent = job.kind === "edit" ? "Use this seed" : "Again with this seed";
    if (over) at("preview").replaceChildren();
    say(`${TITLES[job.status]}. ${at("how").textContent}`);
  }

  // How the server lists it: an event may have gone out before anybody listened.
  stands(job) {
    if (job && job.id === this.job?.id && job.status === "running" && at("stage").dataset.state === "queued") this.state(job);
  }

  how(job) {
    if (job.status === "queued") return "It waits in the queue.";
    if (job.status === "running") return "It has begun.";
    if (job.status === "failed") return job.error?.message ?? "The server does not say why.";
    const took = job.started_at && job.finished_at ? `, ${seconds(job.finished_at - job.started_at)}` : "";
    return `Seed ${job.seed}, ${job.size}${took}`;
  }

  async words(job, signal) {
    const asked = await askedOf(job, this.model).catch(() => null);
    const found = await receiptOf(job);
    if (signal.aborted) return;
    at("stage-prompt").textContent = asked?.prompt ?? "";
    for (const id of ["again", "reuse"]) at(id).disabled = asked === null;
    at("receipt").hidden = found === null;
    at("receipt-text").textContent = found === null ? "" : JSON.stringify(found, null, 2);
  }

  progress({ status, step, steps }) {
    if (status === "queued") return this.state({ ...this.job, status: "queued" });
    if (at("stage").dataset.state !== "running") this.state({ ...this.job, status: "running", progress: 0 });
    if (!steps) return;
    at("progress").value = step / steps;
    if (!at("cancel").disabled) at("how").textContent = `Step ${step} of ${steps}`;
    const quarter = Math.floor((4 * step) / steps);
    if (quarter > this.told) say(`Step ${step} of ${steps}`); // each step would be too much to hear
    this.told = Math.max(this.told, quarter);
  }

  preview({ b64_json: b64, step }) {
    at("preview").replaceChildren(image(pictureOf(b64), `Preview after step ${step}`));
  }

  async finished(job, signal) {
    if (job.status !== "done") return;
    for (let number = 0; number < job.data.length; number += 1) {
      let url;
      try {
        url = await file(job.id, number);
      } catch (error) {
        if (!signal.aborted) at("how").textContent = error.message;
        return;
      }
      if (signal.aborted) return URL.revokeObjectURL(url);
      this.urls.push(url);
      at("outputs").append(make("li", {}, this.output(job, number, url)));
    }
  }

  output(job, number, url) {
    const seed = job.seed + number;
    const isVideo = job.kind === "video";
    const shown = isVideo
      ? make("video", { src: url, controls: true, loop: true, muted: true, "aria-label": `Video with seed ${seed}` })
      : image(url, `Picture ${number + 1} of ${job.n}, seed ${seed}`, true);
    const save = make("a", { href: url, download: `${job.id}-${number}.${isVideo ? "mp4" : "png"}`, textContent: "Save" });
    save.setAttribute("aria-label", `Save ${isVideo ? "video" : "picture"} ${number + 1}`);
    return make("figure", {}, shown, make("figcaption", {}, `Seed ${seed}`, save));
  }

  ending() {
    at("cancel").disabled = true;
    at("how").textContent = "It ends with the step that runs.";
  }

  async cancel() {
    const job = this.job;
    if (!job || isOver(job) || at("cancel").disabled) return;
    this.ending();
    say("Cancelling.");
    const after = await json("DELETE", `v1/jobs/${encodeURIComponent(job.id)}`);
    // one that ran says so itself, by its events
    if (this.job?.id === after.id && isOver(after) && !isOver(this.job)) await this.show(after).then(() => this.changed(after));
  }
}
