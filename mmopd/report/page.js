"use strict";
// Charts and explanations, for the report and for `mmopd watch`.

const root = document.documentElement;
const css = name => getComputedStyle(root).getPropertyValue(name).trim();
const colour = name => css(`--${name}`);
const element = (tag, className, text) => { const e = document.createElement(tag); if (className) e.className = className; if (text) e.textContent = text; return e; };

// Charts.

function card(parent, { title, unit, meaning, swatch, legend: named }, lines) {
  const box = element("figure", "card chart"), legend = element("div", "legend"), plot = element("div", "plot"), heading = element("h3");
  box.style.margin = 0;
  if (swatch) { const mark = element("i", "swatch"); mark.style.setProperty("--c", `var(--${swatch})`); heading.append(mark); }
  const word = element(meaning ? "abbr" : "span", "", title);
  if (meaning) { word.title = meaning; word.tabIndex = 0; }
  heading.append(word);
  box.append(heading, element("p", "", unit), legend, plot);
  if (lines.length > 1 || named) for (const line of lines) {
    const entry = element("span", "", line.name), mark = element("i", line.dash);
    mark.style.setProperty("--c", `var(--${line.colour})`);
    entry.prepend(mark); legend.append(entry);
  }
  document.getElementById(parent).append(box);
  return plot;
}

function layout(more) {
  const axis = { gridcolor: css("--grid"), zerolinecolor: css("--line"), linecolor: css("--line"), tickfont: { size: 11, color: css("--faint") }, automargin: true, fixedrange: true };
  const { xaxis, yaxis, ...rest } = more;
  return {
    margin: { l: 38, r: 12, t: 6, b: 38 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "x unified",
    font: { family: css("--sans"), color: css("--soft"), size: 12 }, hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { size: 12, color: css("--ink") } },
    xaxis: { ...axis, showgrid: false, nticks: 6, ...xaxis }, yaxis: { ...axis, nticks: 5, ...yaxis }, ...rest,
  };
}

const under = text => ({ text, font: { size: 11, color: css("--faint") }, standoff: 4 });

function steps(x) { // round ticks, and the last step
  const first = x[0], last = x[x.length - 1], span = last - first;
  if (!span) return { tickvals: [last], range: [last - 1, last + 1], title: under("step") };
  const rough = span / 4, power = 10 ** Math.floor(Math.log10(rough));
  const every = Math.max(1, [1, 2, 5, 10].map(n => n * power).find(n => n >= rough));
  const tickvals = [];
  for (let at = Math.ceil(first / every) * every; at < last - 0.45 * every; at += every) tickvals.push(at);
  const pad = x.length < 12 ? 0.03 * span : 0;
  return { tickvals: [...tickvals, last], range: [first - pad, last + pad], title: under("step"), ticklabeloverflow: "allow", hoverformat: ",d", tickformat: last < 1e6 ? ",d" : "~s" };
}

function smooth(values) { // Gaussian and centred, so that the smoothed line does not lag
  const width = Math.max(1.2, values.length / 40), reach = Math.ceil(3 * width);
  return values.map((v, i) => {
    let sum = 0, weight = 0;
    for (let j = Math.max(0, i - reach); j <= Math.min(values.length - 1, i + reach); j++) {
      if (values[j] === null) continue;
      const w = Math.exp(-0.5 * ((i - j) / width) ** 2);
      sum += w * values[j]; weight += w;
    }
    return v === null ? null : sum / weight;
  });
}

function curve(chart) {
  const traces = [];
  const few = chart.exact || chart.x.length < 12, dots = chart.x.length < 12;
  for (const s of chart.series) {
    const line = { color: colour(s.colour), width: 2, dash: s.dash }, x = s.x ?? chart.x, base = { x, name: s.name };
    if (chart.band) {
      const edge = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
      traces.push({ ...edge, y: few ? s.low : smooth(s.low) });
      traces.push({ ...edge, y: few ? s.high : smooth(s.high), fill: "tonexty", fillcolor: colour(s.colour) + "26" });
    }
    if (chart.stacked) { traces.push({ ...base, y: s.y, stackgroup: "all", line: { ...line, width: 0.5 }, hovertemplate: "%{y:.2f}" }); continue; }
    if (!few && !chart.band) traces.push({ ...base, y: s.y, line: { color: line.color, width: 1 }, opacity: 0.28, hoverinfo: "skip" });
    traces.push({ ...base, y: few ? s.y : smooth(s.y), mode: dots ? "lines+markers" : "lines", line, customdata: s.y, hovertemplate: "%{customdata:.4g}" });
  }
  const yaxis = chart.log ? { type: "log", exponentformat: "power", dtick: 1 } : {};
  let low = Infinity, high = -Infinity;
  for (const s of chart.series) for (const v of chart.band ? [...s.y, ...s.low, ...s.high] : s.y) if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); }
  if (!low && !high && !chart.log) yaxis.range = [-0.05, 1];
  else if (low === high && low > 0 && !chart.log) yaxis.range = [0, 1.25 * high];
  if (high && high < 1e-3 && low > -1e-3 && !chart.log) yaxis.tickformat = "~e";
  if (chart.share) {
    const top = high > 0.5 ? 1.03 : Math.max(0.05, 1.15 * high);
    yaxis.range = [low < 0.5 ? Math.max(-0.02 * top, low - 0.08 * top) : 0.48, top];
    yaxis.tickformat = top < 0.08 ? ".1%" : ".0%";
  }
  const room = 4 * String(chart.x[chart.x.length - 1]).length; // half of the last step's label
  const line = { color: css("--soft"), width: 1, dash: "dot" };
  const marks = chart.marks.map(at => ({ type: "line", x0: at - 0.5, x1: at - 0.5, yref: "paper", y0: 0, y1: 1, line })); // between two steps
  return [traces, layout({ yaxis, xaxis: steps(chart.x), shapes: marks, margin: { l: 38, r: Math.max(12, room), t: 6, b: 38 } })];
}

function histogram(source) {
  const x = source.before.map((_, i) => i);
  const bar = (name, y, c) => ({ type: "bar", x, y, name, marker: { color: c }, hovertemplate: "%{y:.1%}" });
  return [[bar("before", source.before, colour("o2")), bar("after", source.after, colour("o1"))],
    layout({ barmode: "group", bargap: 0.25, bargroupgap: 0.08, xaxis: { zeroline: false, dtick: x.length > 12 ? undefined : 1, title: under(`right answers of ${x.length - 1}`) }, yaxis: { tickformat: ".0%" } })];
}

const marked = data => data.curves.map(chart => ({ ...chart, marks: data.marks }));

function plotsOf(data) { // adds a card for each chart; `draw` draws one
  const plots = marked(data).map(chart => ({ plot: card("curves", chart, chart.series), of: chart, build: curve }));
  for (const source of data.difficulty) {
    const unit = `${source.rows.toLocaleString("en")} prompts, shape: ${source.shape.replaceAll("_", " ")}, largest weight ${source.largest.toFixed(1)}`;
    const meaning = "How often the untrained student answers the prompts of this source rightly. The weights say how often a prompt is drawn, so that neither easy nor hard ones fill the steps.";
    const lines = [{ name: "before", colour: "o2" }, { name: "after", colour: "o1" }];
    plots.push({ plot: card("difficulty", { title: source.source, unit, meaning, swatch: source.colour }, lines), of: source, build: histogram });
  }
  return plots;
}

const draw = ({ plot, of, build }) => Plotly.react(plot, ...build(of), { displayModeBar: false, responsive: true });

// Light and dark.

function onTheme(draw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    draw();
  });
}

// Explanations of words and values of tokens: on hover, on focus, on tap; Escape closes them.

const tip = document.getElementById("tip"), labels = ["student", "teacher", "difference", "advantage", "image"];
let at = null; // token of the keyboard

function explain(part) { // the browser's own tips appear late, and never on touch
  for (const word of part.querySelectorAll("abbr[title]")) { word.dataset.tip = word.title; word.setAttribute("aria-describedby", "tip"); word.removeAttribute("title"); }
}

function show(target) {
  if (target.dataset.tip) tip.replaceChildren(element("p", "", target.dataset.tip));
  else {
    tip.replaceChildren(element("code", "", target.textContent));
    target.dataset.n.split("|").forEach((n, i) => tip.append(element("span", "", labels[i]), element("b", "", (i > 1 && n >= 0 ? "+" : "") + n.replace("-", "−"))));
  }
  tip.style.display = "grid";
  const box = target.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(innerWidth - size.width - 8, box.left + box.width / 2 - size.width / 2))}px`;
  tip.style.top = `${box.top > size.height + 14 ? box.top - size.height - 8 : box.bottom + 8}px`;
}
const hide = () => { tip.style.display = "none"; if (at) at.classList.remove("at"); at = null; };
for (const event of ["mouseover", "focusin"]) document.addEventListener(event, e => e.target.dataset && (e.target.dataset.n || e.target.dataset.tip) ? show(e.target) : hide());
document.addEventListener("keydown", e => {
  if (e.key === "Escape") hide();
  const list = document.activeElement;
  if (!["ArrowLeft", "ArrowRight"].includes(e.key) || !list.classList.contains("tokens")) return;
  e.preventDefault();
  const next = at && at.parentNode === list ? (e.key === "ArrowRight" ? at.nextElementSibling : at.previousElementSibling) || at : list.firstElementChild;
  hide();
  at = next; at.classList.add("at"); at.scrollIntoView({ block: "nearest" }); show(at);
});
addEventListener("scroll", e => { if (!at) hide(); }, { passive: true });
