// The form: what the model takes is offered, and what the server finds wrong is said beside its field.

import { at, make, tell } from "./dom.js";

const NUMBERS = ["steps", "guidance", "seed", "n", "frames", "fps"];
const INPUTS = { size: ["width", "height"], lora: [] };

export class Form {
  constructor(model) {
    this.model = model;
    const offered = new Set(["prompt", "seed", ...Object.keys(model.takes)]);
    if (model.kind === "video") offered.add("frames").add("fps");
    else offered.add("n");
    if (model.takes_images) offered.add("image");
    if (model.loras.length) offered.add("lora");
    for (const field of document.querySelectorAll("#ask .field")) {
      const name = field.dataset.field;
      field.hidden = !offered.has(name);
      if (field.querySelector(".wrong")) continue;
      const wrong = make("p", { className: "wrong", id: `${name}-wrong`, hidden: true });
      field.append(wrong);
      for (const input of this.inputs(name)) input.setAttribute("aria-describedby", wrong.id);
      field.addEventListener("input", () => this.wrong(name, ""));
    }
    this.offered = offered;
    this.hint();
    this.list();
  }

  inputs(name) {
    if (name === "lora") return [...document.querySelectorAll("#loras input[type=checkbox]")];
    return (INPUTS[name] ?? [name]).map(at);
  }

  // What the model does by itself where a field is empty, and what is the most.
  hint() {
    const { defaults, most, size_multiple: multiple } = this.model;
    for (const name of ["steps", "guidance", "frames"]) at(name).placeholder = defaults[name] ?? "";
    const [width, height] = (defaults.size ?? "").split("x");
    for (const [input, value] of [[at("width"), width], [at("height"), height]]) {
      input.placeholder = value || "auto";
      input.step = multiple ?? 1;
      input.min = multiple ?? 1;
    }
    for (const name of ["steps", "n", "frames"]) if (most[name]) at(name).max = most[name];
  }

  list() {
    at("loras").replaceChildren(
      ...this.model.loras.map((name, index) =>
        make("li", {},
          make("input", { type: "checkbox", id: `lora-${index}`, "aria-describedby": "lora-wrong" }),
          make("label", { htmlFor: `lora-${index}`, textContent: name }),
          make("input", { type: "number", step: "any", value: "1", "aria-label": `Strength of ${name}` }),
        ),
      ),
    );
  }

  // The request's body; null where a field holds no number, which is said there.
  read() {
    this.clear();
    const body = { prompt: at("prompt").value };
    for (const name of NUMBERS) {
      if (!this.offered.has(name)) continue;
      if (at(name).validity.badInput) return this.wrong(name, `${name}: must be a number.`, true);
      if (at(name).value) body[name] = Number(at(name).value);
    }
    if (this.offered.has("negative_prompt") && at("negative_prompt").value) body.negative_prompt = at("negative_prompt").value;
    if (this.offered.has("size") && (at("width").value || at("height").value)) {
      const [width, height] = ["width", "height"].map((name) => at(name).value || at(name).placeholder);
      if (width === "auto" || height === "auto") return this.wrong("size", "size: give both, or neither.", true);
      body.size = `${width}x${height}`;
    }
    const lora = this.loras();
    if (lora.length) body.lora = lora;
    return body;
  }

  loras() {
    const rows = [...document.querySelectorAll("#loras li")];
    return rows.flatMap((row, index) => {
      const [box, scale] = row.querySelectorAll("input");
      return box.checked ? [{ name: this.model.loras[index], scale: Number(scale.value || 1) }] : [];
    });
  }

  picture() {
    return this.offered.has("image") ? at("image").files[0] : undefined;
  }

  fill(body) {
    this.clear();
    const [width = "", height = ""] = (body.size ?? "").split("x");
    const values = { prompt: "", negative_prompt: "", ...body, width, height };
    for (const name of ["prompt", "negative_prompt", "width", "height", ...NUMBERS]) at(name).value = values[name] ?? "";
    at("image").value = "";
    document.querySelectorAll("#loras li").forEach((row, index) => {
      const [box, scale] = row.querySelectorAll("input");
      const asked = (body.lora ?? []).find((one) => one.name === this.model.loras[index]);
      box.checked = asked !== undefined;
      scale.value = asked?.scale ?? 1;
    });
  }

  clear() {
    for (const field of document.querySelectorAll("#ask .field")) this.wrong(field.dataset.field, "");
    tell(at("ask-wrong"), "");
  }

  // Says beside a field what is wrong with it, or that nothing is.
  wrong(name, text, isFirst = false) {
    tell(at(`${name}-wrong`), text);
    for (const input of this.inputs(name)) {
      if (text) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
    }
    if (isFirst) this.inputs(name)[0]?.focus();
    return null;
  }

  // An answer that is an error: by its field where that is here, else below the form.
  refused(error) {
    const field = { input_reference: "image", strength: "image" }[error.param] ?? (error.param ?? "").split(".")[0];
    if (this.offered.has(field)) this.wrong(field, error.message, true);
    else tell(at("ask-wrong"), error.message);
  }
}
