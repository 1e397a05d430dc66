"use strict";
(() => {
  const runs = JSON.parse(document.getElementById("runs").textContent);
  const $ = (id) => document.getElementById(id);
  const is = { axis: "step", log: false, smooth: 0, filter: "", hidden: new Set() };
  const MOST_SAID = 6;

  const el = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children.filter((child) => child !== null));
    return made;
  };
  const color = (index) => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    return `hsl(${(214 + index * 137.508) % 360} ${dark ? 75 : 70}% ${dark ? 66 : 42}%)`;
  };
  const number = (value) => {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en");
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(3) : String(+value.toPrecision(5));
  };
  const duration = (seconds) => {
    if (!(seconds >= 0)) return "–";
    if (seconds < 60) return `${+seconds.toPrecision(3)} s`;
    const h = Math.floor(seconds / 3600), m = Math.floor(seconds / 60) % 60, s = Math.floor(seconds % 60);
    return h ? `${h} h ${m} min` : `${m} min ${s} s`;
  };
  const date = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ") + " UTC";
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // ---- where a step stands on the other axes: between the two points of a table that it lies between
  const between = (table, step) => {
    if (!table.length) return null;
    let low = 0, high = table.length - 1;
    if (step <= table[0][0]) return table[0][1];
    if (step >= table[high][0]) {
      if (!high) return table[0][1];
      const [a, b] = [table[high - 1], table[high]];
      return b[0] > a[0] ? b[1] + ((step - b[0]) * (b[1] - a[1])) / (b[0] - a[0]) : b[1];
    }
    while (high - low > 1) { const middle = (low + high) >> 1; if (table[middle][0] <= step) low = middle; else high = middle; }
    const [a, b] = [table[low], table[high]];
    return b[0] > a[0] ? a[1] + ((step - a[0]) * (b[1] - a[1])) / (b[0] - a[0]) : b[1];
  };
  for (const run of runs) {
    const points = run.records.flatMap((record) => record.points);
    run.byEpoch = run.epochs.map(([epoch, step]) => [step, epoch]);
    run.start = Math.min(...run.records.map((record) => record.started), ...Object.values(run.series).map((c) => (c.t ? c.t[0] : Infinity)));
    run.byTime = points.map((point) => [point[1], point[0] - run.start]).sort((a, b) => a[0] - b[0]);
    if (!run.byTime.length) {
      const timed = Object.values(run.series).find((curve) => curve.t);
      if (timed) run.byTime = timed.x.map((x, i) => [x, timed.t[i] - run.start]);
    }
    // What the sampled clock says, as curves like those of the loggers.
    const own = { "step time in ms": [], "share of time waiting for data": [], "memory in GB": [] };
    for (const record of run.records) {
      record.points.forEach((point, i) => {
        const [time, step, , share, memory] = point, before = record.points[i - 1];
        if (before && step > before[1]) {
          own["step time in ms"].push([step, (1000 * (time - before[0])) / (step - before[1])]);
          own["share of time waiting for data"].push([step, share]);
        }
        if (memory !== null) own["memory in GB"].push([step, memory / 1e9]);
      });
    }
    for (const [name, pairs] of Object.entries(own)) {
      if (pairs.length < 2) continue;
      const values = pairs.map((pair) => pair[1]);
      run.series[name] = { x: pairs.map((pair) => pair[0]), y: values, n: values.length, bad: [], last: values.at(-1),
        min: Math.min(...values), max: Math.max(...values) };
    }
  }
  const place = (run, step, time) => {
    if (is.axis === "step") return step;
    if (is.axis === "epoch") return between(run.byEpoch, step);
    return time === undefined ? between(run.byTime, step) : time - run.start;
  };

  // ---- what ran
  const facts = (title, pairs) => {
    const list = el("dl");
    for (const [name, value] of pairs) list.append(el("dt", {}, name), el("dd", {}, value));
    return el("div", {}, el("h2", {}, title), pairs.length ? list : el("p", { class: "faint" }, "none"));
  };
  const story = (record) => {
    const words = [`${date(record.started)}, ${duration(record.ended - record.started)}`];
    words.push(`steps ${number(record.steps[0])} to ${number(record.steps[1])}, epochs ${number(record.epochs[0])} to ${number(record.epochs[1])}`);
    if (record.resumed_from) words.push(`went on from ${record.resumed_from}`);
    if (record.bad_steps.length) words.push(`${record.bad_steps.length} bad step${record.bad_steps.length > 1 ? "s" : ""} left out`);
    words.push(record.ended_by ? `ended by ${record.ended_by}` : "came to its end");
    return words.join("; ");
  };
  const tell = () => {
    const curves = runs.reduce((sum, run) => sum + Object.keys(run.series).length, 0);
    $("summary").textContent = runs.length === 1
      ? `${runs[0].path}, ${curves} ${curves === 1 ? "curve" : "curves"}`
      : `${runs.length} runs, ${curves} curves`;
    if (runs.length !== 1) return;
    const run = runs[0], last = run.records.at(-1), box = el("div", { class: "facts" });
    if (last) {
      box.append(facts("What ran", Object.entries(last.what).map(([name, value]) => [name, String(value)])));
      const shares = Object.entries(last.shares).sort((a, b) => b[1] - a[1]).filter(([, share]) => share >= 0.005);
      box.append(facts("How it went", [
        ...run.records.map((record, i) => [run.records.length > 1 ? `fit ${i + 1}` : "fit", story(record)]),
        ...shares.map(([part, share]) => [part, `${(100 * share).toFixed(0)} % of the time`]),
      ]));
      box.append(facts("Best checkpoints", last.best.map(([path, monitor, score]) => [monitor ? `${monitor} ${number(score)}` : "newest", path])));
      box.append(facts("Trainer, where it is not the default", Object.entries(last.settings).map(([name, value]) => [name, String(value)])));
    }
    box.append(facts("Hyper-parameters", Object.entries(run.hparams).map(([name, value]) => [name, number(value)])));
    if (last) box.append(facts("Versions", Object.entries(last.versions)));
    $("what").append(box);
  };

  // ---- several runs in a table that shows what differs
  const compare = () => {
    if (runs.length < 2) return;
    const rows = runs.map((run) => {
      const last = run.records.at(-1), row = { ...run.hparams };
      if (last) Object.assign(row, last.settings, { git: last.what.git, precision: last.what.precision, module: last.what.module });
      return row;
    });
    const differing = [...new Set(rows.flatMap(Object.keys))].filter((name) => new Set(rows.map((row) => String(row[name]))).size > 1);
    const metrics = [...new Set(runs.flatMap((run) => Object.keys(run.series)))].filter((name) => runs.some((run) => run.series[name]?.last != null));
    const chosen = metrics.sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1)).slice(0, 12);
    const columns = [
      ...differing.map((name) => [name, (i) => rows[i][name]]),
      ...chosen.map((name) => [name, (i) => runs[i].series[name]?.last]),
    ];
    const body = el("tbody");
    const lines = runs.map((run, i) => {
      const box = el("input", { type: "checkbox", "aria-label": `show ${run.name}` });
      box.checked = true;
      box.addEventListener("change", () => { if (box.checked) is.hidden.delete(i); else is.hidden.add(i); draw(); });
      const swatch = el("span", { class: "swatch", "data-run": i });
      const line = el("tr", {}, el("th", { scope: "row" }, el("label", {}, box, " ", swatch, run.name)));
      for (const [, read] of columns) {
        const value = read(i);
        line.append(el("td", { ...(typeof value === "number" ? { class: "number" } : {}), title: value ?? "" }, value === undefined ? "" : number(value)));
      }
      body.append(line);
      return line;
    });
    const heads = [["run", (i) => runs[i].name], ...columns].map(([name, read]) => {
      const button = el("button", { type: "button", title: `sort by ${name}` }, name);
      const isNumber = runs.some((_, i) => typeof read(i) === "number");
      const head = el("th", { scope: "col", ...(isNumber && { class: "number" }) }, button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
        const order = runs.map((_, i) => i).sort((a, b) => {
          const [x, y] = [read(a), read(b)];
          if (x === y) return a - b;
          if (x === undefined || x === null) return 1;
          if (y === undefined || y === null) return -1;
          return down * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true }));
        });
        order.forEach((i) => body.append(lines[i]));
      });
      return head;
    });
    const note = differing.length ? "Settings that differ, and the last values" : "No setting differs; the last values";
    $("compare").append(el("h2", {}, note), el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": note },
      el("table", {}, el("thead", {}, el("tr", {}, ...heads)), body)));
  };
  const rank = (name) => (/(^|[\/_])(val|valid|test)/.test(name) ? 0 : /loss|acc/.test(name) ? 1 : 2);

  // ---- curves
  const smoothed = (values) => {
    if (!is.smooth) return values;
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = sum * is.smooth + value * (1 - is.smooth);
      weight = weight * is.smooth + 1 - is.smooth;
      return sum / weight;
    });
  };
  const curvesOf = (name) => runs.flatMap((run, index) => {
    const curve = run.series[name];
    if (!curve || is.hidden.has(index)) return [];
    const pairs = curve.x.map((step, i) => [place(run, step, curve.t?.[i]), i]).filter(([x]) => x !== null && Number.isFinite(x));
    pairs.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    const values = smoothed(pairs.map(([, i]) => curve.y[i])).map((y) => (is.log && !(y > 0) ? null : y));
    return [{ run, index, curve, x: pairs.map(([x]) => x), y: values }];
  });
  const marksOf = (curves) => {
    const marks = [];
    const shown = [...new Set(curves.map(({ run }) => run))];
    if (shown.length > 4) return marks;
    for (const run of shown) {
      if (shown.length === 1 && run.byEpoch.length <= 40 && is.axis !== "epoch") {
        run.byEpoch.slice(1).forEach(([step, epoch]) => marks.push({ x: place(run, step), kind: "epoch", text: "" }));
      }
      run.records.forEach((record, i) => {
        if (record.resumed_from || i) marks.push({ x: place(run, record.steps[0]), kind: "resume", text: "resumed" });
        if (record.ended_by) marks.push({ x: place(run, record.steps[1]), kind: "end", text: record.is_signal ? "signal" : "error" });
        record.bad_steps.forEach((step) => marks.push({ x: place(run, step), kind: "bad", text: "bad" }));
      });
    }
    return marks;
  };
  const drawMarks = (plot, marks, bad) => {
    const { ctx, bbox } = plot, ratio = devicePixelRatio || 1;
    ctx.save();
    ctx.font = `${11 * ratio}px sans-serif`;
    ctx.textAlign = "left";
    ctx.textBaseline = "alphabetic";
    let free = -Infinity;
    for (const { x, kind, text } of marks) {
      let left = plot.valToPos(x, "x", true);
      if (kind === "end" && plot.scales.x.max === plot.data[0].at(-1)) left = Math.min(left, bbox.left + bbox.width);
      if (x === null || left < bbox.left - 1 || left > bbox.left + bbox.width + 1) continue;
      ctx.strokeStyle = kind === "epoch" ? style("--line") : kind === "resume" ? style("--accent") : "#d0453e";
      ctx.setLineDash(kind === "epoch" ? [2 * ratio, 3 * ratio] : []);
      ctx.lineWidth = ratio;
      ctx.beginPath();
      ctx.moveTo(left, kind === "bad" ? bbox.top + bbox.height - 8 * ratio : bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
      if (text && kind !== "bad" && left > free) {
        ctx.fillStyle = ctx.strokeStyle;
        const width = ctx.measureText(text).width, turns = left + width + 6 * ratio > bbox.left + bbox.width;
        ctx.fillText(text, turns ? left - width - 3 * ratio : left + 3 * ratio, bbox.top + 11 * ratio);
        free = left + width + 8 * ratio;
      }
    }
    ctx.fillStyle = "#d0453e";
    for (const x of bad) {
      const left = plot.valToPos(x, "x", true);
      ctx.beginPath();
      ctx.moveTo(left - 4 * ratio, bbox.top); ctx.lineTo(left + 4 * ratio, bbox.top); ctx.lineTo(left, bbox.top + 7 * ratio);
      ctx.fill();
    }
    ctx.restore();
  };
  const summary = (name, curves) => {
    const words = curves.slice(0, MOST_SAID).map(({ run, curve }) =>
      `${runs.length > 1 ? `${run.name}: ` : ""}${number(curve.n)} ${curve.n === 1 ? "value" : "values"}, ${number(curve.min)} to ${number(curve.max)}, last ${number(curve.last)}`);
    if (curves.length > MOST_SAID) words.push(`and ${curves.length - MOST_SAID} more runs`);
    return `${name}. ${words.join("; ")}`;
  };
  const plots = new Map();
  const figureOf = (name) => {
    const caption = el("figcaption", {}, name), plot = el("div", { class: "plot", "aria-hidden": "true" });
    const said = el("output", { "aria-live": "polite" });
    const figure = el("figure", { tabindex: "0", role: "img", "data-name": name }, caption, plot, said);
    const entry = { name, figure, plot, said, caption, drawn: null, isNear: false };
    figure.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined || !entry.drawn) return;
      event.preventDefault();
      const xs = entry.drawn.data[0];
      const at = Math.max(0, Math.min(xs.length - 1, (entry.at ?? (by > 0 ? -1 : xs.length)) + by));
      entry.at = at;
      entry.drawn.setCursor({ left: entry.drawn.valToPos(xs[at], "x"), top: 10 });
    });
    return entry;
  };
  const say = (entry, curves, at) => {
    entry.said.replaceChildren();
    if (at === null || at === undefined) { entry.said.textContent = rest(curves); return; }
    const x = entry.drawn.data[0][at], values = curves.map((curve, i) => [curve, entry.drawn.data[i + 1][at]]);
    const having = values.filter(([, y]) => y !== null && y !== undefined);
    entry.said.append(el("b", {}, `${is.axis} ${is.axis === "time" ? duration(x) : number(x)} `));
    having.slice(0, MOST_SAID).forEach(([curve, y]) => {
      const swatch = el("span", { class: "swatch" });
      swatch.style.background = color(curve.index);
      entry.said.append(swatch, runs.length > 1 ? `${curve.run.name} ` : "", number(y), "  ");
    });
    if (having.length > MOST_SAID) entry.said.append(`and ${having.length - MOST_SAID} more`);
  };
  const rest = (curves) => {
    const bad = curves.reduce((sum, { curve }) => sum + curve.bad.length, 0), only = curves.length === 1 ? curves[0].curve : null;
    const words = only ? [`last ${number(only.last)}, least ${number(only.min)}, most ${number(only.max)}`] : [`${curves.length} runs`];
    if (bad) words.push(`${bad >= 100 ? "100 and more" : bad} not finite`);
    return words.join("; ");
  };
  const show = (entry) => {
    const curves = curvesOf(entry.name).filter(({ x }) => x.length);
    entry.drawn?.destroy();
    entry.drawn = null;
    entry.plot.replaceChildren();
    entry.figure.setAttribute("aria-label", summary(entry.name, curves));
    if (!curves.length) {
      entry.plot.append(el("p", { class: "faint" }, is.axis === "time" ? "These files say nothing of the time." : "Nothing to show."));
      entry.said.textContent = "";
      return;
    }
    const marks = marksOf(curves);
    const bad = curves.flatMap(({ run, curve }) => curve.bad.map((step) => place(run, step))).filter((x) => x !== null).slice(0, 200);
    const isPoint = (curve) => curve.y.filter((y) => y !== null).length <= 40;
    const axis = { stroke: style("--faint"), grid: { stroke: style("--grid"), width: 1 }, ticks: { show: false }, font: "12px sans-serif" };
    const hasPositive = curves.some(({ y }) => y.some((value) => value > 0));
    const options = {
      width: Math.max(200, entry.plot.clientWidth), height: 220, legend: { show: false },
      cursor: { y: false, points: { show: curves.length <= 12 }, drag: { x: true, y: false } }, focus: { alpha: 0.25 },
      scales: { x: { time: false, ...(single(curves) && { range: around }) }, y: is.log && hasPositive ? { distr: 3 } : { range: padded } },
      axes: [
        { ...axis, size: 34, values: (_, ticks) => ticks.map((t) => (t === null ? "" : is.axis === "time" ? duration(t) : short(t))) },
        { ...axis, size: 62, values: (_, ticks) => ticks.map((t) => (t === null ? "" : short(t))) },
      ],
      series: [{}, ...curves.map((curve) => ({
        label: curve.run.name, stroke: color(curve.index), width: curves.length > 20 ? 1 : 1.6, spanGaps: false,
        dash: curve.index >= 24 && curves.length < 40 ? [6, 3] : undefined, points: { show: isPoint(curve), size: 5 },
      }))],
      hooks: { draw: [(plot) => drawMarks(plot, marks, bad)], setCursor: [(plot) => say(entry, curves, plot.cursor.idx)] },
    };
    const tables = curves.map(({ x, y }) => [x, y]);
    const data = tables.length === 1 ? tables[0] : uPlot.join(tables);
    entry.drawn = new uPlot(options, data, entry.plot);
    entry.said.textContent = rest(curves);
  };
  const single = (curves) => new Set(curves.flatMap(({ x }) => x)).size === 1;
  const around = (_, low, high) => [low - 1, high + 1];
  const padded = (_, low, high) => {
    if (low === null) return [0, 1];
    if (low === high) { const by = Math.abs(low) * 0.1 || 1; return [low - by, high + by]; }
    const by = (high - low) * 0.06;
    return [low - by, high + by];
  };
  const short = (value) => {
    const size = Math.abs(value);
    if (size >= 1e5) return value.toExponential(1).replace("e+", "e");
    return size !== 0 && size < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(4));
  };

  // ---- all of it
  const watch = new IntersectionObserver((changes) => {
    for (const { target, isIntersecting } of changes) {
      const entry = plots.get(target.dataset.name);
      entry.isNear = isIntersecting;
      if (isIntersecting && entry.isStale) { entry.isStale = false; show(entry); }
    }
  }, { rootMargin: "400px" });
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.series)))].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b, "en", { numeric: true }));
  for (const name of names) {
    const entry = figureOf(name);
    plots.set(name, entry);
    $("charts").append(entry.figure);
    watch.observe(entry.figure);
  }
  if (!names.length) $("charts").append(el("p", { class: "faint" }, "Nothing was logged in a number: there are no curves."));
  const draw = () => {
    let count = 0;
    for (const entry of plots.values()) {
      const isShown = entry.name.toLowerCase().includes(is.filter.toLowerCase());
      entry.figure.hidden = !isShown;
      entry.isStale = true;
      entry.at = undefined;
      if (!isShown) continue;
      count += 1;
      if (entry.isNear) { entry.isStale = false; show(entry); }
    }
    $("shown").textContent = names.length ? `${count} of ${names.length} shown` : "";
    document.querySelectorAll(".swatch[data-run]").forEach((each) => { each.style.background = color(+each.dataset.run); });
  };
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("axis").addEventListener("change", (event) => { is.axis = event.target.value; draw(); });
  $("log").addEventListener("change", (event) => { is.log = event.target.checked; draw(); });
  $("smooth").addEventListener("input", (event) => { is.smooth = +event.target.value; draw(); });
  $("filter").addEventListener("input", (event) => { is.filter = event.target.value.trim(); draw(); });
  for (const option of $("axis").options) {
    if (option.value === "epoch") option.disabled = !runs.some((run) => run.byEpoch.length);
    if (option.value === "time") option.disabled = !runs.some((run) => run.byTime.length);
  }
  $("controls").hidden = !names.length;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    for (const { drawn, plot } of plots.values()) drawn?.setSize({ width: Math.max(200, plot.clientWidth), height: 220 });
  });
  tell();
  compare();
  draw();
})();
