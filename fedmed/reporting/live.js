(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const at = (id) => document.getElementById(id);
  const number = (value) => (value === null || value === undefined ? "–" : value.toFixed(3).replace("-", "−"));
  const curve = { rounds: [], value: [], low: [], high: [], lossRounds: [], loss: [] };
  let next = 0, round = 0, started = null, seconds = [], losses = [], sites = new Map(), epsilon = null, over = false;

  const duration = (s) => (s < 60 ? `${Math.round(s)} s` : s < 3600 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`);
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

  const restart = () => {  // a run that was resumed tells its later rounds again
    sites = new Map(); losses = [];
  };

  const take = (event) => {
    const state = (site, text, loss) => sites.set(site, { text, loss });
    if (event.kind === "run_started") { at("status").textContent = "running"; over = false; seconds = []; }
    if (event.kind === "round_started") {
      restart(); round = event.round; started = Date.parse(event.time);
      for (const site of event.sites || []) state(site, "at work", null);
    }
    if (event.kind === "update_received") {
      state(event.site, "done", event.loss);
      if (event.loss !== null && event.loss !== undefined) losses.push(event.loss);
      if (typeof event.epsilon === "number") epsilon = Math.max(epsilon ?? 0, event.epsilon);
    }
    if (event.kind === "site_failed" || event.kind === "update_refused") state(event.site, `dropped: ${event.reason}`, null);
    if (event.kind === "evaluated") {
      const found = (event.metrics || {})[facts.primary];
      const place = curve.rounds.indexOf(event.round);
      if (place >= 0) for (const key of ["rounds", "value", "low", "high"]) curve[key].splice(place);
      curve.rounds.push(event.round); curve.value.push(found ? found.value : null);
      curve.low.push(found ? found.low : null); curve.high.push(found ? found.high : null);
    }
    if (event.kind === "round_finished") {
      seconds.push(event.seconds);
      const place = curve.lossRounds.indexOf(event.round);
      if (place >= 0) { curve.lossRounds.splice(place); curve.loss.splice(place); }
      if (losses.length) { curve.lossRounds.push(event.round); curve.loss.push(mean(losses)); }
    }
    if (event.kind === "run_finished") { over = true; at("status").textContent = event.status; at("status").className = `badge ${event.status}`; }
  };

  const say = (event) => {
    const rest = Object.entries(event).filter(([key]) => !["time", "round", "kind", "metrics", "sites"].includes(key));
    const shown = ([key, value]) => {
      if (key === "images" && value < 10) return "images<10";  // small counts of a site are not told
      return `${key}=${typeof value === "number" ? Number(value.toPrecision(4)) : typeof value === "object" ? JSON.stringify(value) : value}`;
    };
    return `${event.time}  round ${event.round}  ${event.kind}  ${rest.map(shown).join(" ")}`;
  };

  const draw = () => {
    const ink = getComputedStyle(document.body).color;
    const grid = "rgba(128,128,128,0.25)";
    const known = curve.rounds.map((_, place) => place).filter((place) => curve.low[place] !== null);
    const band = {
      type: "scatter", mode: "lines", fill: "toself", fillcolor: "#0072B233", line: { width: 0 }, hoverinfo: "skip", showlegend: false,
      x: [...known.map((place) => curve.rounds[place]), ...known.map((place) => curve.rounds[place]).reverse()],
      y: [...known.map((place) => curve.low[place]), ...known.map((place) => curve.high[place]).reverse()],
    };
    const line = (x, y, colour, name, axis) => ({ type: "scatter", mode: "lines+markers", x, y, name, yaxis: axis, line: { color: colour, width: 2 }, marker: { size: 7 }, showlegend: false });
    Plotly.react("plot-live", [band, line(curve.rounds, curve.value, "#0072B2", facts.title, "y"), line(curve.lossRounds, curve.loss, "#D55E00", "training loss", "y2")], {
      height: 420, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 60, r: 15, t: 12, b: 45 }, font: { family: "system-ui, sans-serif", size: 13, color: ink },
      xaxis: { title: { text: "round" }, range: [0.7, Math.max(facts.rounds, round, 1) + 0.3], gridcolor: grid, anchor: "y2", tickformat: "d" },
      yaxis: { title: { text: facts.title }, domain: [0.42, 1], gridcolor: grid }, yaxis2: { title: { text: "training loss" }, domain: [0, 0.34], gridcolor: grid },
    }, { displayModeBar: false, responsive: true });
  };

  const show = (latest) => {
    const finished = seconds.length ? curve.lossRounds.concat(curve.rounds).reduce((most, value) => Math.max(most, value), 0) : 0;
    at("round").textContent = `${round} of ${facts.rounds}`;
    at("done").style.width = `${facts.rounds ? (100 * (over ? round : finished)) / facts.rounds : 0}%`;
    at("done").parentNode.setAttribute("aria-valuenow", finished);
    const answered = [...sites.values()].filter((site) => site.text !== "at work").length;
    at("sites").textContent = sites.size ? `${answered} of ${sites.size}` : "–";
    const left = seconds.length ? mean(seconds) * (facts.rounds - finished) - (started && round > finished ? Math.min((Date.now() - started) / 1000, mean(seconds)) : 0) : null;
    at("eta").textContent = over ? "none" : left === null ? "–" : duration(Math.max(left, 0));
    at("loss").textContent = losses.length ? number(mean(losses)) : "–";
    const last = curve.value[curve.value.length - 1];
    at("metric").textContent = number(last);
    if (epsilon !== null) { at("epsilon-tile").hidden = false; at("epsilon").textContent = (Math.ceil(epsilon * 100) / 100).toFixed(2); }
    at("said").textContent = say(latest);
    document.title = `${round}/${facts.rounds} ${at("status").textContent}`;
    const rows = [...sites].slice(0, 200).map(([name, site]) => {
      const row = document.createElement("tr");
      for (const text of [name, site.text, number(site.loss)]) row.appendChild(document.createElement("td")).textContent = text;
      row.lastChild.className = "n";
      return row;
    });
    at("table").replaceChildren(...rows);
    if (curve.rounds.length || curve.lossRounds.length) draw();
  };

  const lines = [];
  const poll = async () => {
    try {
      const answer = await (await fetch(`/events?from=${next}`)).json();
      next = answer.next;
      for (const event of answer.events) { take(event); lines.push(say(event)); }
      if (answer.events.length) {
        lines.splice(0, Math.max(lines.length - 200, 0));
        at("log").textContent = lines.slice().reverse().join("\n");
        show(answer.events[answer.events.length - 1]);
        if (answer.report) at("finished").hidden = false;
      }
    } catch { at("said").textContent = "fedmed report --live is not answering; is it still running?"; }
    setTimeout(poll, 1000);
  };
  poll();
})();
