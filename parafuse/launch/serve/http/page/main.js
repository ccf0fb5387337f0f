// The page: asks for the key where one is needed, and joins form, stage and history.

import { ApiError, json, key } from "./api.js";
import { askedOf, remember } from "./asked.js";
import { at, say, seconds, tell } from "./dom.js";
import { Form } from "./form.js";
import { History } from "./history.js";
import { isOver, Stage } from "./stage.js";

const BUSY_MS = 2000;
const IDLE_MS = 6000;
const PREVIEWS = 3;
let page = null; // {model, form, stage, history}, once the server has let us in

async function open() {
  let model;
  try {
    model = (await json("GET", "v1/models")).data[0];
  } catch (error) {
    return closed(error);
  }
  at("door").hidden = true;
  at("studio").hidden = false;
  at("forget").hidden = !key.get();
  at("model").textContent = model.id;
  document.title = `${model.id} · parafuse`;
  tell(at("notice"), "");
  const stage = new Stage(model, (job) => changed(job));
  const history = new History(model, { opened: (job) => show(job), again });
  page = { model, form: new Form(model), stage, history };
  at("prompt").focus();
  const jobs = await history.refresh();
  const going = jobs.find((job) => job.status === "running") ?? jobs.find((job) => !isOver(job)) ?? jobs[0];
  if (going) show(going);
  watchQueue(page);
}

// What to do about a server that does not let us in.
function closed(error) {
  page?.stage.leave();
  page = null;
  at("studio").hidden = true;
  at("forget").hidden = true;
  tell(at("notice"), "");
  const needsKey = error.code === "invalid_api_key";
  at("door").hidden = !needsKey;
  if (!needsKey) {
    tell(at("notice"), error.message);
    if (error.status === 0 || error.status >= 500) setTimeout(open, BUSY_MS);
    return;
  }
  tell(at("key-wrong"), key.get() ? "The server does not know this key." : "");
  key.forget();
  at("key").value = "";
  at("key").focus();
}

function fault(error) {
  if (error.name === "AbortError") return;
  if (error instanceof ApiError && error.status === 401) closed(error);
  else tell(at("notice"), error.message);
}

function show(job) {
  page.history.mark(job.id);
  page.stage.show(job).catch(fault);
}

// The job on the stage stands otherwise.
function changed(job) {
  if (job === null) page.history.take(page.history.current);
  else page.history.put(job);
}

async function paint() {
  const { form, model } = page;
  const body = form.read();
  if (body === null || at("paint").disabled) return;
  at("paint").disabled = true;
  try {
    const job = await send(body, form.picture(), model);
    tell(at("notice"), "");
    remember(job.id, body);
    page.history.put(job);
    show(job);
  } catch (error) {
    if (!(error instanceof ApiError) || error.status === 401) fault(error);
    else form.refused(error);
  } finally {
    at("paint").disabled = false;
  }
}

async function send(body, picture, model) {
  const isVideo = model.kind === "video";
  const whole = isVideo ? body : { ...body, background: true, partial_images: PREVIEWS };
  let asked = whole;
  if (picture) {
    asked = new FormData();
    for (const [name, value] of Object.entries(whole)) asked.append(name, name === "lora" ? JSON.stringify(value) : value);
    asked.append(isVideo ? "input_reference" : "image", picture);
  }
  const path = isVideo ? "v1/videos" : picture ? "v1/images/edits" : "v1/images/generations";
  const made = await json("POST", path, { body: asked });
  return isVideo ? json("GET", `v1/jobs/${encodeURIComponent(made.id)}`) : made;
}

async function again(job) {
  if (await reuse(job, true)) await paint();
}

// Puts what a job was asked for into the form. Says whether it can be sent as it is.
async function reuse(job, withSeed) {
  const asked = await askedOf(job, page.model);
  if (asked === null) return false;
  page.form.fill(withSeed ? asked : { ...asked, seed: "" });
  if (job.kind !== "edit") return true;
  page.form.wrong("image", "Choose the picture again: the server does not give it back.", true);
  return false;
}

async function remove(job) {
  await json("DELETE", `v1/files/${encodeURIComponent(job.id)}`);
  page.stage.leave();
  page.history.take(job.id);
  say("Deleted.");
}

// How the server stands, for as long as this is the page that is open and somebody sees it.
async function watchQueue(mine) {
  while (page === mine) {
    let pause = IDLE_MS;
    if (!document.hidden) {
      try {
        const queue = await json("GET", "v1/queue");
        if (page !== mine) return;
        at("queue").textContent = told(queue);
        if (queue.running || queue.queued) pause = BUSY_MS;
        if (mine.history.hasOpen) (await mine.history.refresh()).forEach((job) => mine.stage.stands(job));
      } catch (error) {
        if (page !== mine) return;
        if (error.status === 401) return closed(error);
        at("queue").textContent = error.message;
      }
    }
    await new Promise((done) => setTimeout(done, pause));
  }
}

function told({ state, why, queued, queued_of_key: own, running }) {
  const words = [state === "ready" ? "Ready" : why ? `${state}: ${why}` : state];
  if (running) words.push(`step ${running.step} of ${running.steps}, ${seconds(running.seconds_left)} left`);
  words.push(queued ? `${queued} waiting, ${own} of them yours` : "none waiting");
  return words.join(" · ");
}

const doing = (act) => (event) => {
  event.preventDefault();
  Promise.resolve(act()).catch(fault);
};

at("door").addEventListener("submit", doing(() => {
  const given = at("key").value.trim();
  if (!key.isOne(given)) return tell(at("key-wrong"), given ? "This is no key: it holds other signs than keys do." : "Type the key first.");
  key.set(given);
  return open();
}));
at("forget").addEventListener("click", doing(() => {
  sessionStorage.clear();
  location.reload();
}));
at("ask").addEventListener("submit", doing(paint));
at("cancel").addEventListener("click", doing(() => page.stage.cancel()));
at("again").addEventListener("click", doing(() => again(page.stage.job)));
at("reuse").addEventListener("click", doing(() => reuse(page.stage.job, false).then((ready) => ready && at("prompt").focus())));
at("remove").addEventListener("click", doing(() => remove(page.stage.job)));
at("older").addEventListener("click", doing(() => page.history.older()));
document.addEventListener("keydown", (event) => {
  if (page === null || event.isComposing) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) doing(paint)(event);
  else if (event.key === "Escape") doing(() => page.stage.cancel())(event);
});
open().catch(fault);
