"use strict";
const plots = JSON.parse(document.getElementById("plots").textContent);
const touch = matchMedia("(pointer: coarse)").matches;
const config = {
  responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover", modeBarButtons: [["toImage", "resetScale2d"]],
};

for (const [id, plot] of Object.entries(plots)) {
  if (touch) plot.layout.dragmode = false; // a finger scrolls the page
  Plotly.newPlot(id, plot.data, plot.layout, config).then(element => element.on("plotly_relayout", () => zoomAllAs(element)));
}

// All plots have the same steps: who looks closer in one compares with the others.
let zooming = false;
async function zoomAllAs(element) {
  if (zooming) return;
  const range = element.layout.xaxis.range.slice();
  const others = Object.keys(plots).map(id => document.getElementById(id))
    .filter(other => String(other.layout.xaxis.range) !== String(range));
  zooming = true;
  await Promise.all(others.map(other => Plotly.relayout(other, { "xaxis.range": range.slice() })));
  zooming = false;
}

for (const button of document.querySelectorAll("button[data-line]")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    for (const [id, plot] of Object.entries(plots)) {
      const lines = plot.data.map((trace, i) => (trace.legendgroup === button.dataset.line ? i : -1)).filter(i => i >= 0);
      if (lines.length && document.getElementById(button.dataset.within).contains(document.getElementById(id)))
        Plotly.restyle(id, { visible: shown }, lines);
    }
  });
}

// A phone shows two or three columns of pictures: begin with the picked one among them.
for (const head of document.querySelectorAll(".samples th.picked")) {
  const scroll = head.closest(".scroll");
  scroll.scrollLeft = head.offsetLeft - (scroll.clientWidth - head.offsetWidth) / 2;
}

// Paper is narrower than most windows, and plots are as wide as they were drawn.
function fitAll(sizeOf) {
  for (const id of Object.keys(plots)) {
    const element = document.getElementById(id);
    Plotly.relayout(element, sizeOf(element));
  }
}
addEventListener("beforeprint", () => {
  document.body.classList.add("paper");
  fitAll(element => ({ width: element.clientWidth }));
});
addEventListener("afterprint", () => {
  document.body.classList.remove("paper");
  fitAll(() => ({ width: null, autosize: true }));
});
