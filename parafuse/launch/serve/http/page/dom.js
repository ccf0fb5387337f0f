// Elements by id, and new ones. Words from users and from the server become text, never HTML.

export const at = (id) => document.getElementById(id);

export function make(name, attributes = {}, ...inside) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) {
    if (attribute in made) made[attribute] = value;
    else made.setAttribute(attribute, value);
  }
  made.append(...inside);
  return made;
}

// What a screen reader says now. The same words twice are said twice.
export function say(text) {
  at("said").textContent = "";
  at("said").textContent = text;
}

export function tell(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

export function pictureOf(b64) {
  const bytes = Uint8Array.from(atob(b64), (one) => one.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
}

// An <img> of a blob; `isKept`: its URL is used for more than this, and is given back by whoever made it.
export function image(url, alt, isKept = false) {
  const made = make("img", { alt });
  if (!isKept) made.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
  made.src = url;
  return made;
}

export function seconds(number) {
  if (number < 10) return `${Math.max(1, Math.round(number))} s`;
  return number < 120 ? `${Math.round(number)} s` : `${Math.round(number / 60)} min`;
}
