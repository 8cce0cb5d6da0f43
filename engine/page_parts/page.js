"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const COLOURS = 8, ALL = "all";
  const state = { off: new Set(), sort: { cells: null, paired: null } };

  // ---- words ---------------------------------------------------------------------------------------------------------
  const percent = (fraction) => `${+(100 * fraction).toPrecision(6)} %`;
  const sparsityName = (sparsity) => (sparsity === 0 ? "dense" : percent(sparsity));
  const spread = (mean, std) => mean.toFixed(2) + (std === null ? "" : ` ± ${std.toFixed(2)}`);
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
  const millions = (count) => `${(count / 1e6).toFixed(1)} M`;
  const unique = (values) => [...new Set(values)];

  function element(name, attributes = {}, ...children) {
    const svg = ["svg", "g", "path", "line", "text", "circle"].includes(name);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  // ---- one look per row of the tables: colour, shape and dash ----------------------------------------------------------
  const SHAPES = [
    "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0Z", "M-3.6-3.6H3.6V3.6H-3.6Z", "M0-5L5 0L0 5L-5 0Z", "M0-4.8L4.8 3.6H-4.8Z",
    "M0 4.8L4.8-3.6H-4.8Z", "M-1.5-4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
    "M-4.5-2.4L-2.4-4.5L0-2.1L2.4-4.5L4.5-2.4L2.1 0L4.5 2.4L2.4 4.5L0 2.1L-2.4 4.5L-4.5 2.4L-2.1 0Z", "M-5 0L0-3V3ZM5 0L0-3V3Z",
    "M0-5L1.5-1.6L5-1.4L2.3 1L3.2 4.5L0 2.6L-3.2 4.5L-2.3 1L-5-1.4L-1.5-1.6Z",
  ];
  const DASHES = ["", "7 4", "2 3", "8 3 2 3"];
  let looks = new Map();
  const look = (row) => looks.get(row) || { colour: "var(--quiet)", shape: SHAPES[0], dash: "" };
  function mark(row, size = 1) {
    const { colour, shape } = look(row);
    return element("path", { class: "mark", d: shape, transform: `scale(${size})`, style: `fill:${colour};stroke:${colour}` });
  }

  // ---- filters ---------------------------------------------------------------------------------------------------------
  const FILTERS = ["experiment", "model", "dataset", "scale", "sparsity"];
  const keyOf = (cell, filter) => String(cell[filter]);
  const chosen = (filter) => byId(filter).value;
  const within = (cell, filters) => filters.every((f) => chosen(f) === ALL || keyOf(cell, f) === chosen(f));
  const titleOf = new Map(data.experiments.map((e) => [e.name, e.title]));

  function fill(filter, names) {
    const options = unique(data.cells.map((cell) => keyOf(cell, filter)));
    if (filter === "sparsity") options.sort((a, b) => a - b);
    const select = byId(filter);
    select.append(new Option("all", ALL), ...options.map((value) => new Option(names(value), value)));
    select.addEventListener("change", () => { if (filter === "experiment") state.off.clear(); render(); });
  }
  fill("experiment", (name) => {
    const experiment = data.experiments.find((e) => e.name === name);
    return experiment.run ? experiment.title : `${experiment.title}: not run`;
  });
  for (const filter of ["model", "dataset", "scale"]) fill(filter, (name) => name);
  fill("sparsity", (value) => sparsityName(Number(value)));
  const fullest = [...data.experiments].sort((a, b) => b.run - a.run)[0];
  if (fullest) byId("experiment").value = fullest.name;

  function methods() {
    const cells = data.cells.filter((cell) => within(cell, FILTERS.slice(0, 4)) && cell.sparsity > 0);
    const ours = unique(cells.map((cell) => cell.row));
    const rows = unique([...ours, ...cells.flatMap((cell) => cell.published.map((figure) => figure.name))]);
    looks = new Map(rows.map((row, i) => [row, {
      colour: `var(--c${i % COLOURS})`, shape: SHAPES[i % SHAPES.length], dash: DASHES[Math.floor(i / COLOURS) % DASHES.length],
    }]));
    const box = byId("methods");
    const focused = box.contains(document.activeElement) ? document.activeElement.value : null;
    const buttons = [["all", () => state.off.clear()], ["none", () => rows.forEach((row) => state.off.add(row))]].map(([name, act]) => {
      const button = element("button", { type: "button", value: `button ${name}` }, name);
      button.addEventListener("click", () => { act(); render(); });
      return button;
    });
    box.replaceChildren(element("legend", {}, "Methods"), ...rows.map((row) => {
      const input = element("input", { type: "checkbox", value: row });
      input.checked = !state.off.has(row);
      input.addEventListener("change", () => { state.off[input.checked ? "delete" : "add"](row); render(); });
      const swatch = element("svg", { width: 26, height: 14, viewBox: "-13 -7 26 14", "aria-hidden": "true" },
        element("path", { d: "M-13 0H13", style: `stroke:${look(row).colour};stroke-width:1.8`, "stroke-dasharray": look(row).dash }), mark(row));
      const label = element("label", {}, input, swatch, ours.includes(row) ? row : `${row} (published)`);
      label.classList.toggle("off", !input.checked);
      return label;
    }), ...(rows.length > 2 ? buttons : []));
    if (focused) [...box.querySelectorAll("input, button")].find((node) => node.value === focused)?.focus();
  }

  const visible = (cell) => within(cell, FILTERS.slice(0, 4)) && !state.off.has(cell.row)
    && (chosen("sparsity") === ALL || cell.sparsity === 0 || keyOf(cell, "sparsity") === chosen("sparsity"));
  const listed = (cell) => within(cell, FILTERS) && !state.off.has(cell.row);

  // ---- tooltip ---------------------------------------------------------------------------------------------------------
  const tip = byId("tip");
  let pinned = null;
  function showTip(anchor, lines, links) {
    tip.replaceChildren(element("strong", {}, lines[0]), ...lines.slice(1).map((line) => element("span", {}, line)));
    if (links.length) {
      tip.append(element("span", {}, "Evidence, seed: ", ...links.flatMap(([seed, href]) => [element("a", { href }, String(seed)), " "])));
    }
    tip.hidden = false;
    const at = anchor.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(6, at.left + at.width / 2 - own.width / 2), document.documentElement.clientWidth - own.width - 6);
    const above = at.top - own.height - 4;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : at.bottom + 4}px`;
  }
  function hideTip() { tip.hidden = true; pinned = null; }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  document.addEventListener("click", (event) => {
    if (pinned && !tip.contains(event.target) && !event.target.closest(".point")) hideTip();
  });
  addEventListener("scroll", () => { if (!tip.hidden) hideTip(); }, { passive: true });

  function point(x, y, row, lines, links, { focusable = true, shape = true, attributes = {} } = {}) {
    const group = element("g", { class: "point", transform: `translate(${x.toFixed(2)} ${y.toFixed(2)})`, role: "img", "aria-label": lines.join(", "), ...attributes });
    group.append(element("circle", { class: "hit", r: shape ? 11 : 7 }));
    if (shape) group.append(mark(row));
    if (focusable) group.setAttribute("tabindex", "0");
    const show = () => showTip(group, lines, links);
    group.addEventListener("pointerenter", () => { if (!pinned) show(); });
    group.addEventListener("pointerleave", () => { if (!pinned) tip.hidden = true; });
    group.addEventListener("focus", show);
    group.addEventListener("blur", () => { if (pinned !== group) tip.hidden = true; });
    group.addEventListener("click", (event) => { event.stopPropagation(); show(); pinned = group; });
    return group;
  }

  // ---- charts ----------------------------------------------------------------------------------------------------------
  function niceTicks(low, high, count) {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= raw - 1e-12);
    const ticks = [];
    for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + 1e-9 * step; t += step) ticks.push(+t.toPrecision(12));
    return ticks;
  }
  function logTicks(low, high) { // axis values are log10
    const ticks = [];
    for (let e = Math.floor(low); e <= Math.ceil(high); e++) for (const f of high - low > 1.6 ? [1] : high - low > 0.7 ? [1, 3] : [1, 1.5, 2, 3, 4, 5, 7]) ticks.push(e + Math.log10(f));
    return ticks.filter((t) => t >= low - 1e-9 && t <= high + 1e-9);
  }
  const extent = (values, margin) => {
    const low = Math.min(...values), high = Math.max(...values), pad = margin * (high - low) || Math.abs(high) * 0.02 || 1;
    return [low - pad, high + pad];
  };

  /* A chart: lines of points {x, y, std, lines, links, published} on axes {label, range, ticks: [[value, text]]}. */
  function chart(panel, { title, lines, levels = [], x, y, bottom = 46, focusable = true, rotate = false }) {
    const figure = element("div", { class: "panel" }, element("h3", {}, title));
    panel.append(figure);
    const width = Math.max(260, Math.floor(figure.getBoundingClientRect().width)), height = 250 + bottom;
    const box = { left: 68, right: width - 12, top: 10, bottom: height - bottom };
    const px = (v) => box.left + (v - x.range[0]) / (x.range[1] - x.range[0]) * (box.right - box.left);
    const py = (v) => box.bottom - (v - y.range[0]) / (y.range[1] - y.range[0]) * (box.bottom - box.top);
    const svg = element("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": `${title}: ${y.label} against ${x.label}` });
    let lowest = Infinity;
    for (const [value, text] of y.ticks) {
      if (lowest - py(value) < 15) continue;
      lowest = py(value);
      svg.append(element("line", { class: "grid", x1: box.left, x2: box.right, y1: py(value), y2: py(value) }),
        element("text", { class: "ytick", x: box.left - 6, y: py(value) + 4, "text-anchor": "end", "data-value": value }, text));
    }
    let last = -Infinity;
    for (const [value, text] of x.ticks) {
      const at = px(value), room = rotate ? 9 : 7 * text.length + 8;
      if (at - last < room && !(rotate && at - last >= 9)) continue;
      last = at;
      svg.append(element("line", { class: "axis", x1: at, x2: at, y1: box.bottom, y2: box.bottom + 4 }));
      svg.append(rotate
        ? element("text", { transform: `translate(${at + 4} ${box.bottom + 8}) rotate(-90)`, "text-anchor": "end", style: "font-size:10px" }, text)
        : element("text", { class: "xtick", x: at, y: box.bottom + 17, "text-anchor": "middle", "data-value": value }, text));
    }
    svg.append(element("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    if (x.label) svg.append(element("text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, x.label));
    svg.append(element("text", { transform: `translate(12 ${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, y.label));
    for (const level of levels) {
      svg.append(element("path", { class: "dense", d: `M${box.left} ${py(level.y)}H${box.right}` }));
      svg.append(point(box.right - 8, py(level.y), null, level.lines, level.links, { attributes: { "data-row": "dense", "data-mean": level.y } }));
    }
    const marked = (points, p) => points.length <= 30 || points.indexOf(p) % Math.ceil(points.length / 10) === 0;
    for (const line of lines) {
      const colour = look(line.row).colour, group = element("g", { "data-line": line.row, class: line.published ? "published" : "" });
      const d = line.points.map((p, i) => (p.y === null ? "" : `${i && line.points[i - 1].y !== null ? "L" : "M"}${px(p.x).toFixed(2)} ${py(p.y).toFixed(2)}`)).join("");
      if (!line.published) group.append(element("path", { class: "line", d, style: `stroke:${colour}`, "stroke-dasharray": look(line.row).dash }));
      for (const p of line.points) {
        if (p.y === null) continue;
        if (p.std) group.append(element("path", { d: `M${px(p.x)} ${py(p.y - p.std)}V${py(p.y + p.std)}m-4 0h8M${px(p.x) - 4} ${py(p.y - p.std)}h8`, style: `stroke:${colour};stroke-width:1.4;fill:none` }));
        group.append(point(px(p.x), py(p.y), line.row, p.lines, p.links, { focusable, shape: marked(line.points, p), attributes: p.attributes }));
      }
      svg.append(group);
    }
    figure.append(svg);
  }

  const groupBy = (cells, key) => cells.reduce((groups, cell) => groups.set(key(cell), [...(groups.get(key(cell)) || []), cell]), new Map());
  const titleFor = (cell) => `${titleOf.get(cell.experiment)}: ${cell.title}`;
  const reached = (cell) => (cell.offTarget ? ` at ${percent(+cell.achieved.toFixed(4))}` : "");
  const describe = (cell) => [
    `${cell.row}, ${sparsityName(cell.sparsity)}`, `top-1 ${spread(cell.mean, cell.std)} %${reached(cell)}, n = ${cell.n}`,
    `${cell.nonzeros[0].toLocaleString("en")} weights left, ${millions(cell.flops)} FLOPs`, ...(cell.note ? [cell.note] : []),
  ];
  const pointOf = (cell, x) => ({ x, y: cell.mean, std: cell.std, lines: describe(cell), links: cell.evidence, attributes: { "data-row": cell.row, "data-sparsity": cell.sparsity, "data-mean": cell.mean, "data-n": cell.n } });
  const linesOf = (cells, place) => [...groupBy(cells, (cell) => cell.row)].map(([row, members]) => ({ row, points: members.map((cell) => pointOf(cell, place(cell))).sort((a, b) => a.x - b.x) }));
  function publishedLines(cells, place) {
    const { dataset, model, scale } = cells[0];
    if (scale !== "full") return [];
    const wanted = data.published.filter((f) => f.dataset === dataset && f.model === model && f.sparsity > 0 && place(f) !== null
      && (chosen("sparsity") === ALL || String(f.sparsity) === chosen("sparsity")));
    return [...groupBy(wanted, (f) => f.name)].filter(([name]) => !state.off.has(name)).map(([name, figures]) => ({ row: name, published: true, points: figures.map((f) => ({
      x: place(f), y: f.top1, std: null, links: [], lines: [`published: ${name}, ${percent(f.at ?? f.sparsity)}`, `top-1 ${f.top1.toFixed(2)} %`, f.source],
      attributes: { "data-published": f.top1 } })) }));
  }
  function accuracyAxis(lines, levels) {
    const values = [...lines.flatMap((l) => l.points.flatMap((p) => [p.y - (p.std || 0), p.y + (p.std || 0)])), ...levels.map((l) => l.y)];
    const range = extent(values, 0.06);
    return { label: "top-1 (%)", range, ticks: niceTicks(...range, 6).map((t) => [t, String(t)]) };
  }
  const left = (sparsity) => -Math.log10(Math.max(1 - sparsity, 1e-6));

  function empty(panel, text) { if (!panel.children.length) panel.append(element("p", {}, text)); }
  const NONE = "Nothing of this has been run; the table lists the commands.";

  const NARROWEST = 0.3; // breadth of the axis at the least, so that what runs missed one target by looks small

  function drawSparsity(cells) {
    const panel = byId("by-sparsity");
    for (const members of groupBy(cells, (cell) => cell.group).values()) {
      const sparse = members.filter((cell) => cell.sparsity > 0 && cell.n), dense = members.filter((cell) => cell.sparsity === 0 && cell.n);
      const lines = [...publishedLines(members, (f) => left(f.at ?? f.sparsity)), ...linesOf(sparse, (cell) => left(cell.achieved))];
      if (!lines.length) continue;
      const levels = dense.map((cell) => ({ y: cell.mean, lines: describe(cell), links: cell.evidence }));
      if (unique(sparse.map((cell) => cell.sparsity)).length === 1) // one target: the methods stand side by side
        lines.filter((l) => !l.published).forEach((line, i, all) => line.points.forEach((p) => { p.x += 0.8 * NARROWEST * ((i + 0.5) / all.length - 0.5); }));
      const places = lines.flatMap((l) => l.points.map((p) => p.x));
      const missing = Math.max(0, NARROWEST - (Math.max(...places) - Math.min(...places))) / 2;
      const ticks = unique([...sparse.map((cell) => cell.sparsity), ...lines.filter((l) => l.published).flatMap(() => [0.8, 0.9, 0.95, 0.98, 0.99])]).sort((a, b) => a - b);
      chart(panel, { title: titleFor(members[0]), lines, levels, y: accuracyAxis(lines, levels),
        x: { label: "sparsity (log scale of the weights left)", range: extent([Math.min(...places) - missing, Math.max(...places) + missing], 0.08), ticks: ticks.map((s) => [left(s), percent(s)]) } });
    }
    empty(panel, NONE);
  }

  function drawFlops(cells) {
    const panel = byId("by-flops");
    for (const members of groupBy(cells, (cell) => cell.group).values()) {
      const ran = members.filter((cell) => cell.n && cell.flops > 0);
      const lines = [...publishedLines(members, (f) => (f.flops ? Math.log10(f.flops) : null)), ...linesOf(ran, (cell) => Math.log10(cell.flops))];
      if (!lines.length) continue;
      const range = extent(lines.flatMap((l) => l.points.map((p) => p.x)), 0.06);
      chart(panel, { title: titleFor(members[0]), lines, y: accuracyAxis(lines, []),
        x: { label: "FLOPs (log scale)", range, ticks: logTicks(...range).map((t) => [t, `${+(10 ** t / 1e6).toPrecision(2)} M`]) } });
    }
    empty(panel, NONE);
  }

  const perSparsity = (cells) => groupBy(cells.filter((cell) => cell.n && cell.sparsity > 0), (cell) => `${cell.group}/${cell.sparsity}`);

  function drawLayers(cells) {
    const panel = byId("by-layer"), floor = -4;
    for (const members of perSparsity(cells).values()) {
      const names = data.layers[members[0].group];
      const place = (value) => Math.max(Math.log10(Math.max(value, 1e-12)), floor);
      const lines = members.map((cell) => ({ row: cell.row, points: cell.left.map((value, i) => ({ x: i, y: place(value), std: null, links: cell.evidence,
        lines: [`${cell.row}, layer ${names[i]}`, `${(100 * (1 - value)).toFixed(3)} % zeros`], attributes: { "data-row": cell.row, "data-layer": names[i], "data-left": value } })) }));
      const low = Math.min(...lines.flatMap((l) => l.points.map((p) => p.y)));
      const ticks = [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001].filter((t) => Math.log10(t) > low - 0.15).map((t) => [-Math.log10(t), percent(1 - t)]);
      if (low <= floor) ticks.push([-floor, "100 %"]); // a layer without any weight left
      for (const line of lines) for (const p of line.points) p.y = -p.y; // more zeros further up
      chart(panel, { title: `${titleFor(members[0])}, ${percent(members[0].sparsity)}`, lines, focusable: false, bottom: 120, rotate: true,
        y: { label: "zeros (log scale of the weights left)", range: [-0.08, -low + 0.1], ticks }, x: { label: "", range: [-0.6, names.length - 0.4], ticks: names.map((name, i) => [i, name]) } });
    }
    empty(panel, NONE);
  }

  function drawMask(cells) {
    const panel = byId("by-mask");
    for (const members of perSparsity(cells).values()) {
      const lines = members.map((cell) => ({ row: cell.row, points: cell.history.epoch.map((epoch, i) => {
        const change = cell.history.mask[i];
        return { x: epoch, y: change > 0 ? Math.log10(change) : null, std: null, links: cell.evidence,
          lines: [`${cell.row}, epoch ${+epoch.toFixed(2)}`, `mask change ${change > 0 ? change.toExponential(2) : 0}`, `mean of n = ${cell.n}`],
          attributes: { "data-row": cell.row, "data-epoch": epoch, "data-change": change } };
      }) }));
      const points = lines.flatMap((l) => l.points), drawn = points.filter((p) => p.y !== null);
      if (!drawn.length) continue;
      const yRange = extent(drawn.map((p) => p.y), 0.06), xRange = extent(points.map((p) => p.x), 0.02);
      chart(panel, { title: `${titleFor(members[0])}, ${percent(members[0].sparsity)}`, lines, focusable: false,
        y: { label: "weights per step (fraction)", range: yRange, ticks: logTicks(...yRange).map((t) => [t, (10 ** t).toExponential(0)]) },
        x: { label: "epoch", range: xRange, ticks: niceTicks(Math.max(0, xRange[0]), xRange[1], 6).map((t) => [t, String(t)]) } });
    }
    empty(panel, "No run of this selection has recorded how its mask changed.");
  }

  // ---- tables ----------------------------------------------------------------------------------------------------------
  const number = (value, text) => ({ sort: value, text, kind: "number" });
  const word = (text, kind = "") => ({ sort: text, text, kind });
  const none = (text) => ({ sort: null, text, kind: "none" });
  const links = (cell) => ({ sort: cell.n, kind: "", nodes: cell.evidence.flatMap(([seed, href]) => [element("a", { href }, String(seed)), " "]) });

  const CELLS = [
    ["Method", (c) => word(c.row)],
    ["Sparsity", (c) => number(c.sparsity, sparsityName(c.sparsity))],
    ["Top-1 (%)", (c) => (c.n ? number(c.mean, spread(c.mean, c.std) + reached(c)) : none("not run"))],
    ["n", (c) => number(c.n, String(c.n))],
    ["Published (%)", (c) => (c.published.length ? number(c.published[0].top1, c.published.map((f) => f.top1.toFixed(2)).join(", ")) : none(c.unknown ? "unknown" : "none"))],
    ["Difference", (c) => (c.n && c.published.length ? number(c.mean - c.published[0].top1, c.published.map((f) => signed(c.mean - f.top1)).join(", ")) : none("-"))],
    ["Source", (c) => (c.published.length ? word(c.published.map((f) => f.source).join(", ")) : none("-"))],
    ["Experiment", (c) => word(titleOf.get(c.experiment))],
    ["Network", (c) => word(c.model)],
    ["Data", (c) => word(c.dataset)],
    ["Scale", (c) => word(c.scale)],
    ["Best epoch (%)", (c) => (c.n ? number(c.best, spread(c.best, c.bestStd)) : none("-"))],
    ["Weights left", (c) => (c.n ? number(c.nonzeros[0], unique([c.nonzeros[0], c.nonzeros.at(-1)]).map((v) => v.toLocaleString("en")).join(" to ")) : none("-"))],
    ["FLOPs", (c) => (c.n ? number(c.flops, millions(c.flops)) : none("-"))],
    ["Mask change", (c) => (c.n && c.maskChange !== null ? number(c.maskChange, c.maskChange.toExponential(1)) : none("-"))],
    ["Framework", (c) => word(c.framework)],
    ["p", (c) => word(c.p)],
    ["theta", (c) => word(c.theta)],
    ["Epochs", (c) => number(Number(c.epochs), c.epochs)],
    ["Hardware", (c) => (c.n ? word(c.device) : none("-"))],
    ["Evidence", (c) => (c.n ? links(c) : none(c.command || "-"))],
    ["Note", (c) => word(c.note)],
  ];
  const PAIRED = [
    ["Method", (c) => word(data.cells[c.cell].row)],
    ["Sparsity", (c) => number(data.cells[c.cell].sparsity, percent(data.cells[c.cell].sparsity))],
    ["n", (c) => number(c.n, String(c.n))],
    ["Difference", (c) => (c.difference === null ? none("-") : number(c.difference, signed(c.difference)))],
    ["95 % interval", (c) => (c.low === null ? none("-") : number(c.low, `${signed(c.low)} to ${signed(c.high)}`))],
    ["Told", (c) => word(c.told)],
    ["Experiment", (c) => word(titleOf.get(data.cells[c.cell].experiment))],
    ["Network", (c) => word(data.cells[c.cell].model)],
  ];

  function table(id, columns, members, missing) {
    const node = byId(id), sort = state.sort[id];
    const rows = members.map((member) => columns.map(([, cell]) => cell(member)));
    if (sort) {
      const sign = sort.down ? -1 : 1;
      rows.sort((a, b) => {
        const [u, v] = [a[sort.column].sort, b[sort.column].sort];
        if (u === null || v === null) return (u === null) - (v === null); // what was not run stays last
        return sign * (typeof u === "number" ? u - v : String(u).localeCompare(String(v), "en", { numeric: true }));
      });
    }
    const head = element("tr", {}, ...columns.map(([name], i) => {
      const button = element("button", { type: "button" }, name);
      button.addEventListener("click", () => {
        state.sort[id] = { column: i, down: sort?.column === i && !sort.down };
        table(id, columns, members, missing);
        node.querySelectorAll("th button")[i].focus();
      });
      return element("th", { scope: "col", "aria-sort": sort?.column === i ? (sort.down ? "descending" : "ascending") : "none" }, button);
    }));
    const body = rows.map((row) => element("tr", {}, ...row.map(({ text, kind, nodes }) => element("td", kind ? { class: kind } : {}, ...(nodes || [text])))));
    if (!body.length) body.push(element("tr", {}, element("td", { colspan: columns.length }, missing)));
    node.replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
  }

  // ---- theme -----------------------------------------------------------------------------------------------------------
  const THEMES = ["system", "light", "dark"], remembered = "feather-results-theme";
  function setTheme(theme) {
    if (theme === "system") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = theme;
    byId("theme").textContent = `Theme: ${theme}`;
  }
  let theme = "system";
  try { theme = THEMES.includes(localStorage.getItem(remembered)) ? localStorage.getItem(remembered) : theme; } catch { /* a page from a file may have no storage */ }
  setTheme(theme);
  byId("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    setTheme(theme);
    try { localStorage.setItem(remembered, theme); } catch { /* as above */ }
  });

  // ---- all of it -------------------------------------------------------------------------------------------------------
  const DRAWN = ["by-sparsity", "by-flops", "by-layer", "by-mask"];
  function draw() {
    hideTip();
    const heights = DRAWN.map((id) => byId(id).offsetHeight);
    DRAWN.forEach((id, i) => { byId(id).style.minHeight = `${heights[i]}px`; byId(id).replaceChildren(); }); // the page keeps its place
    const cells = data.cells.filter(visible);
    drawSparsity(cells); drawFlops(cells); drawLayers(cells); drawMask(cells);
    DRAWN.forEach((id) => { byId(id).style.minHeight = ""; });
  }
  function render() {
    methods();
    const shown = data.experiments.filter((e) => chosen("experiment") === ALL ? e.scale === "proxy" && e.run : e.name === chosen("experiment"));
    byId("notes").replaceChildren(...unique(shown.flatMap((e) => e.notes.map((note) => `${chosen("experiment") === ALL ? `${e.title}: ` : ""}${note}`)))
      .map((note) => element("p", note.includes("Proxy scale") ? { class: "proxy" } : {}, note)));
    draw();
    table("cells", CELLS, data.cells.filter(listed), "Nothing matches these filters.");
    table("paired", PAIRED, data.comparisons.filter((c) => listed(data.cells[c.cell])), "No cell of this selection can be paired with Feather.");
  }
  let width = 0, waiting = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => { if (innerWidth !== width) { width = innerWidth; draw(); } });
  });
  width = innerWidth;
  render();
})();
