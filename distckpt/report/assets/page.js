// Shows, beside a chart, what was computed for the place under the pointer or the arrow keys; and switches the theme.
"use strict";

const tip = document.querySelector(".tip");

function element(name, style, text) {
  const made = document.createElement(name);
  if (style) made.className = style;
  if (text !== undefined) made.textContent = text;
  return made;
}

// A tip is [place from the left, 0 to 1000; head; rows of [name, figure, class]; spots of [height, class]].
function fill([, head, rows]) {
  const lines = rows.map(([name, figure, style]) => {
    const line = element("div");
    line.append(element("i", style), element("span", "", name), element("b", "", figure));
    return line;
  });
  tip.replaceChildren(element("h4", "", head), ...lines);
}

function mark(hair, [at, , , spots]) {
  hair.style.left = `${at / 10}%`;
  hair.replaceChildren(...spots.map(([height, style]) => {
    const spot = element("i", style);
    spot.style.bottom = `${height / 10}%`;
    return spot;
  }));
  hair.hidden = false;
}

function place(plot, at) {
  const box = plot.getBoundingClientRect();
  const middle = box.left + (box.width * at) / 1000;
  const width = tip.offsetWidth, room = document.documentElement.clientWidth;
  let left = middle + 14;
  if (left + width > room - 12) left = middle - 14 - width;
  left = Math.max(12, Math.min(left, room - 12 - width));
  tip.style.transform = `translate(${Math.round(left + scrollX)}px, ${Math.round(box.top + scrollY + 8)}px)`;
}

function nearest(tips, at) {
  let low = 0, high = tips.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (tips[middle][0] < at) low = middle; else high = middle;
  }
  return at - tips[low][0] <= tips[high][0] - at ? low : high;
}

for (const chart of document.querySelectorAll(".chart")) {
  const held = chart.querySelector('script[type="application/json"]');
  if (!held) continue;
  const tips = JSON.parse(held.textContent);
  const frame = chart.querySelector(".frame"), plot = chart.querySelector(".plot"), hair = chart.querySelector(".hair");
  let current = tips.length - 1;
  frame.setAttribute("role", "slider");
  frame.setAttribute("aria-label", `${chart.querySelector("h3").textContent}: read it with the arrow keys`);
  frame.setAttribute("aria-valuemin", "1");
  frame.setAttribute("aria-valuemax", String(tips.length));

  const say = () => {
    const [, head, rows] = tips[current];
    frame.setAttribute("aria-valuenow", String(current + 1));
    frame.setAttribute("aria-valuetext", [head, ...rows.map(([name, figure]) => `${name} ${figure}`)].join(", "));
  };
  const show = (index) => {
    current = Math.max(0, Math.min(tips.length - 1, index));
    fill(tips[current]);
    mark(hair, tips[current]);
    tip.hidden = false;
    place(plot, tips[current][0]);
    say();
  };
  const hide = () => {
    tip.hidden = true;
    hair.hidden = true;
  };
  say();
  const follow = (event) => {
    const box = plot.getBoundingClientRect();
    show(nearest(tips, (1000 * (event.clientX - box.left)) / box.width));
  };
  frame.addEventListener("pointermove", follow);
  frame.addEventListener("pointerdown", follow);
  frame.addEventListener("pointerleave", hide);
  frame.addEventListener("blur", hide);
  frame.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: current - 1, ArrowRight: current + 1, ArrowDown: current - 1, ArrowUp: current + 1,
                    PageDown: current - 20, PageUp: current + 20, Home: 0, End: tips.length - 1 };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
}

const button = document.querySelector(".theme");
button.hidden = false;
const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
name();
button.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  name();
});
