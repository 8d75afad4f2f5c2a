// Asks for the parts that have changed, and puts them in their places.

const EVERY = 2000, HIDDEN = 20000; // milliseconds
const places = Object.fromEntries([...document.querySelectorAll("[data-part]")].map(place => [place.dataset.part, place]));
const have = {}; // digest of each part that is shown
let run = 0, log = "", timer, plots = [], shape = "", heard = null;

// Charts: drawn when they come near the window.

const near = new IntersectionObserver(entries => entries.forEach(entry => {
  const one = plots.find(p => p.plot === entry.target);
  if (one) { one.near = entry.isIntersecting; drawDirty(one); }
}), { rootMargin: "400px" });

function drawDirty(one) {
  if (!one.near || !one.dirty) return;
  one.dirty = false;
  draw(one);
}

function redraw() { plots.forEach(one => { one.dirty = true; drawDirty(one); }); }

function charts(data) {
  const now = JSON.stringify([data.curves.map(c => [c.title, c.unit, c.legend, c.series.map(s => [s.name, s.colour, s.dash])]), data.difficulty.map(d => [d.source, d.rows, d.shape])]);
  const all = [...marked(data), ...data.difficulty];
  if (now === shape) plots.forEach((one, i) => { one.of = all[i]; });
  else {
    near.disconnect();
    plots.forEach(one => Plotly.purge(one.plot));
    for (const id of ["curves", "difficulty"]) document.getElementById(id).replaceChildren();
    plots = plotsOf(data);
    shape = now;
    plots.forEach(one => { explain(one.plot.parentNode); near.observe(one.plot); });
  }
  redraw();
}

// Parts.

function isRead(place) { // what somebody reads is not taken away
  const focus = document.activeElement;
  return place.dataset.part !== "runs" && ((focus !== place && place.contains(focus)) || place.querySelector(".tokens:hover") !== null);
}

function put(place, html) {
  const open = [...place.querySelectorAll("details")].map(d => d.open);
  const scrolled = [...place.querySelectorAll("ul[tabindex], pre[tabindex], .card[tabindex]")].map(e => e.scrollTop);
  const atEnd = place.scrollHeight - place.scrollTop - place.clientHeight < 40, focus = place.contains(document.activeElement) && document.activeElement.dataset.run;
  if (place.matches(":hover")) hide();
  place.innerHTML = html;
  place.querySelectorAll("details").forEach((d, i) => { d.open = open[i] || false; });
  place.querySelectorAll("ul[tabindex], pre[tabindex], .card[tabindex]").forEach((e, i) => { e.scrollTop = scrolled[i] || 0; });
  if (place.dataset.part === "log" && atEnd) place.scrollTop = place.scrollHeight;
  if (focus) place.querySelector(`[data-run="${focus}"]`)?.focus();
  explain(place);
}

function apply(state) {
  for (const [name, html] of Object.entries(state.parts)) {
    const place = places[name];
    if (!place) continue;
    const waits = isRead(place);
    place.toggleAttribute("data-waiting", waits && name === "responses");
    if (waits) continue;
    put(place, html.trim());
    have[name] = state.digests[name];
  }
  if (state.data) { charts(state.data); have.data = state.digests.data; }
  document.getElementById("name").textContent = state.name;
  document.title = `${state.title ? state.title + " · " : ""}${state.name} · mmopd`;
}

// Connection.

function told(live) {
  const link = document.getElementById("link"), lost = document.getElementById("lost");
  if (live) heard = new Date();
  const text = live ? "live" : "not connected";
  if (link.textContent !== text) link.textContent = text;
  link.className = live ? "live" : "lost";
  lost.hidden = live;
  if (!live) lost.textContent = `The page is no longer served${heard ? `, and shows what was there at ${heard.toLocaleTimeString("en-GB")}` : ""}. “mmopd watch RUN” serves it again, at another address.`;
}

async function poll() {
  clearTimeout(timer);
  const asked = run;
  try {
    const answer = await fetch(`state?${new URLSearchParams({ run, log, have: Object.values(have).join(",") })}`);
    if (!answer.ok) throw new Error(answer.status);
    const state = await answer.json();
    if (asked === run) apply(state);
    told(true);
  } catch (error) {
    console.warn(error);
    told(false);
  }
  clearTimeout(timer);
  timer = setTimeout(poll, document.hidden ? HIDDEN : EVERY);
}

document.addEventListener("click", event => {
  const button = event.target.closest("[data-run]");
  if (!button) return;
  run = Number(button.dataset.run);
  log = "";
  for (const name of Object.keys(have)) delete have[name];
  poll();
});
document.addEventListener("change", event => {
  if (event.target.id !== "log-name") return;
  log = event.target.value;
  delete have.log;
  poll().then(() => { places.log.scrollTop = places.log.scrollHeight; });
});
document.addEventListener("keydown", event => { if (event.key === "Escape" && document.activeElement.closest("[data-waiting]")) document.activeElement.blur(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
onTheme(redraw);
poll();
