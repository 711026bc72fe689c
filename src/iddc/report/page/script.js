"use strict";
// The line between photo and mask.
function moveable(input) {
  const move = () => input.parentElement.style.setProperty("--at", input.value / 100);
  input.addEventListener("input", move);
  move();  // a browser may restore an earlier value
}
for (const input of document.querySelectorAll(".stage input")) moveable(input);
// Enlarge a sample or a mosaic.
const large = document.getElementById("large");
function enlarge(part) {
  const copy = part.cloneNode(true), image = part.querySelector("img") ?? part;
  large.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  large.querySelector("div").replaceChildren(copy);
  const input = copy.querySelector("input");
  if (input) moveable(input);
  large.showModal();
}
for (const button of document.querySelectorAll(".enlarge")) {
  button.hidden = false;
  button.addEventListener("click", () => enlarge(button.closest("figure").querySelector(".stage")));
}
for (const button of document.querySelectorAll(".mosaic")) {
  button.addEventListener("click", () => enlarge(button.querySelector("img")));
}
large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
// The first images are shown; the others on demand.
const more = document.getElementById("more");
if (more) {
  more.hidden = false;
  more.addEventListener("click", () => {
    for (const figure of document.querySelectorAll(".later")) figure.classList.add("shown");
    more.hidden = true;
  });
}
const opacity = document.getElementById("opacity");
if (opacity) {
  const fade = () => document.documentElement.style.setProperty("--opacity", opacity.value / 100);
  opacity.addEventListener("input", fade);
  fade();
}
// Pointing at a sample names the cluster there, by the colour in the mask.
const names = {};
for (const legend of document.querySelectorAll(".legend")) {
  const own = (names[legend.dataset.side] = {});
  for (const item of legend.querySelectorAll("[data-colour]")) own[item.dataset.colour] ??= item.textContent;
}
const canvas = document.createElement("canvas");
const pen = canvas.getContext("2d", { willReadFrequently: true });
let drawn = null;
for (const sample of document.querySelectorAll(".sample")) {
  const mask = sample.querySelector(".mask"), output = sample.querySelector("output");
  sample.addEventListener("pointermove", (event) => {
    if (drawn !== mask) {
      [canvas.width, canvas.height] = [mask.naturalWidth, mask.naturalHeight];
      pen.drawImage(mask, 0, 0);
      drawn = mask;
    }
    const box = mask.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * canvas.width);
    const y = Math.floor(((event.clientY - box.top) / box.height) * canvas.height);
    const [red, green, blue, alpha] = pen.getImageData(x, y, 1, 1).data;
    const colour = "#" + [red, green, blue].map((v) => v.toString(16).padStart(2, "0")).join("");
    output.textContent = alpha ? names[sample.dataset.side][colour] ?? "" : "";
  });
  sample.addEventListener("pointerleave", () => (output.textContent = ""));
}
// Tables as tab-separated text.
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const table = button.parentElement.querySelector("table");
    const text = [...table.rows].map((row) => [...row.cells].map((cell) => cell.innerText).join("\t")).join("\n");
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(table);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}
