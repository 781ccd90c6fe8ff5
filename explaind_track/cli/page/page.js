"use strict";
// Draws the figures, whose data stand in the page as JSON. Drag over a figure to zoom, double-click to go back.

const figures = JSON.parse(document.getElementById("figures").textContent);
const styles = getComputedStyle(document.documentElement);
const dashes = [[], [9, 4], [2, 3], [9, 3, 2, 3]];
const height = 280;
const plots = new Map();

const color = name => styles.getPropertyValue(name).trim();
const borders = ["solid", "dashed", "dotted", "double"];  // of the legend, in the place of the dashes
const shown = value => {
  if (value == null) return "";
  const rounded = Number(value.toPrecision(4));
  return rounded !== 0 && Math.abs(rounded) < 1e-3 ? rounded.toExponential() : rounded.toString();
};

// the values of each curve on top of those before it, for a stacked figure
function stacked(curves) {
  const sums = curves[0].values.map(() => 0);
  return curves.map(curve => curve.values.map((value, place) => value == null ? null : (sums[place] += value)));
}

// with bands, three curves in a row are one: its mean, its lowest and its highest
const lookOf = (figure, number) => figure.banded ? Math.floor(number / 3) : number;

function bandsOf(figure, colors) {
  // each area reaches down to the curve below it
  if (figure.stacked) return figure.curves.slice(1).map((_, number) => ({ series: [number + 2, number + 1] }));
  if (!figure.banded) return [];
  return figure.curves.filter((_, number) => number % 3 === 0).map((_, number) =>
    ({ series: [3 * number + 3, 3 * number + 2], fill: colors[number % colors.length] + "33" }));
}

function options(figure, width) {
  const colors = color("--curves").split(" ");
  const heights = (plot, low, high) => {
    const whole = plot.scales.x.min <= figure.steps[0] && plot.scales.x.max >= figure.steps.at(-1);
    if (figure.range && whole) return figure.range;
    return low == null ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true);
  };
  const axis = { stroke: color("--quiet"), grid: { stroke: color("--rule") }, ticks: { stroke: color("--rule") } };
  const series = figure.curves.map((curve, number) => ({
    label: curve.name,
    stroke: colors[lookOf(figure, number) % colors.length],
    fill: figure.stacked ? colors[number % colors.length] + "66" : undefined,
    dash: dashes[lookOf(figure, number) % dashes.length],
    width: figure.stacked ? 1 : figure.banded && number % 3 ? 0.5 : 1.5,
    spanGaps: true,
    points: { show: figure.steps.length === 1 },
    value: (plot, value, curveNumber, place) => place == null ? "–" : shown(curve.values[place]),
  }));
  return {
    width, height, series: [{ label: "step" }, ...series],
    bands: bandsOf(figure, colors),
    scales: { x: { time: false }, y: figure.log ? { distr: 3 } : { range: heights } },
    axes: [{ ...axis, label: "training step", labelSize: 20, stroke: color("--quiet") },
           { ...axis, size: 70, values: (plot, ticks) => ticks.map(tick => tick == null ? "" : shown(tick)) }],
    cursor: { drag: { x: true, y: false } },
    legend: { markers: { width: 2, dash: (plot, number) => borders[lookOf(figure, number - 1) % borders.length] } },
  };
}

function draw(place) {
  const figure = figures[Number(place.dataset.figure)];
  const values = figure.stacked ? stacked(figure.curves) : figure.curves.map(curve => curve.values);
  plots.get(place)?.destroy();
  plots.set(place, new uPlot(options(figure, place.clientWidth), [figure.steps, ...values], place));
}

// the figure as a picture of its own, with its title and the names of its curves
function download(place) {
  const figure = figures[Number(place.dataset.figure)];
  const drawn = plots.get(place).ctx.canvas;
  const scale = drawn.width / place.clientWidth, line = 18 * scale;
  const picture = Object.assign(document.createElement("canvas"),
    { width: drawn.width, height: drawn.height + line * (figure.curves.length + 2) });
  const pen = picture.getContext("2d");
  pen.fillStyle = color("--page");
  pen.fillRect(0, 0, picture.width, picture.height);
  pen.drawImage(drawn, 0, line * 1.5);

  pen.fillStyle = color("--text");
  pen.font = `600 ${14 * scale}px sans-serif`;
  pen.fillText(figure.title, line / 2, line);
  pen.font = `${12 * scale}px sans-serif`;
  const colors = color("--curves").split(" ");
  figure.curves.forEach((curve, number) => {
    const bottom = drawn.height + line * (number + 2);
    pen.strokeStyle = colors[lookOf(figure, number) % colors.length];
    pen.lineWidth = 2 * scale;
    pen.setLineDash(dashes[lookOf(figure, number) % dashes.length].map(length => length * scale));
    pen.beginPath();
    pen.moveTo(line / 2, bottom - line / 4);
    pen.lineTo(line * 2, bottom - line / 4);
    pen.stroke();
    pen.fillText(curve.name, line * 2.5, bottom);
  });
  picture.toBlob(content => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(content) });
    link.download = `${figure.title.replace(/\W+/g, "-")}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });
}

const places = [...document.querySelectorAll(".plot")];
places.forEach(draw);
places.forEach(place => place.parentElement.querySelector(".download").addEventListener("click", () => download(place)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => places.forEach(draw));
const resized = new ResizeObserver(entries => entries.forEach(({ target }) => {
  const plot = plots.get(target);
  if (plot.width !== target.clientWidth) plot.setSize({ width: target.clientWidth, height });
}));
places.forEach(place => resized.observe(place));
