"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const chosen = { token: Math.min(data.tokens.length - 1, 1), segment: 0, slot: 0, measure: "", place: 0 };

  /* tables: bytes between low and high, 255 for none */
  const unpack = (table) => {
    const levels = Uint8Array.from(atob(table.bytes), (letter) => letter.charCodeAt(0));
    const [rows, columns] = table.shape;
    const get = (row, column) => {
      const level = row < rows && column < columns ? levels[row * columns + column] : 255;
      return level === 255 ? NaN : table.low + ((table.high - table.low) * level) / 254;
    };
    return { rows, columns, low: table.low, high: table.high, get };
  };
  const bits = data.bits.map((value) => (value === null ? NaN : value));
  const known = bits.filter(Number.isFinite).sort((a, b) => a - b);
  const sources = data.sources.map((source) => ({ ...source, table: unpack(source.table) }));
  sources.unshift({
    name: "surprise in bits", part: "model", unit: "token", means: "bits that a token cost",
    table: { rows: bits.length, columns: 1, low: 0, high: known[Math.floor(known.length * 0.99)] || 1, get: (row) => bits[row] },
  });
  const places = data.places.map((place) => ({
    ...place,
    tables: Object.fromEntries(Object.entries(place.tables).map(([name, table]) => [name, unpack(table)])),
  }));

  const make = (tag, options = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), options);
    node.append(...children);
    return node;
  };
  const number = (value) =>
    !Number.isFinite(value) ? "none" : Math.abs(value) < 5e-7 ? "0" : Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(2).replace(/^(-?)0\./, "$1.");
  const fill = (select, names) => {
    const before = select.value;
    select.replaceChildren(...names.map((name, index) => make("option", { value: String(index), textContent: name })));
    select.value = names[Number(before)] === undefined || before === "" ? "0" : before;
  };
  const readable = (text) => (text === "\n" ? "new line" : text === " " ? "space" : text === "\t" ? "tab" : text);
  const segmentOf = (token) => data.segments.findIndex(([start, stop]) => token >= start && token < stop);

  /* ---- tokens ---- */
  const box = at("tokens"), spans = [];
  const starts = new Map(data.segments.map(([start], index) => [start, index]));
  data.tokens.forEach((text, index) => {
    if (starts.has(index)) box.append(make("sup", { textContent: starts.get(index) + 1, ariaHidden: "true" }));
    const span = make("span", { id: "t" + index, textContent: text === "\n" ? "↵\n" : text });
    span.setAttribute("role", "option");
    if (text.length > 1 && (text.startsWith("\\") || text.startsWith("⟨"))) span.className = "odd";
    span.dataset.index = index;
    spans.push(span);
    box.append(span);
  });
  const names = [...new Set(sources.map((source) => source.name))];
  const partsOf = (name) => sources.filter((source) => source.name === name);
  const colour = () => {
    const source = partsOf(names[at("colour").value])[at("part").value];
    return { source, unit: Number(at("unit").value) - 1 }; // -1: the mean
  };
  const valueOf = (table, row, unit) => {
    if (unit >= 0) return table.get(row, unit);
    let total = 0, count = 0;
    for (let column = 0; column < table.columns; column++) {
      const value = table.get(row, column);
      if (Number.isFinite(value)) { total += value; count++; }
    }
    return count ? total / count : NaN;
  };
  const paint = () => {
    const { source, unit } = colour();
    const values = spans.map((_, index) => valueOf(source.table, index, unit));
    const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
    const low = source.unit === "token" ? 0 : sorted[Math.floor(sorted.length * 0.01)] ?? 0;
    const high = sorted[Math.floor(sorted.length * 0.99)] ?? 1;
    values.forEach((value, index) => {
      const share = Number.isFinite(value) ? Math.min(1, Math.max(0, (value - low) / (high - low || 1))) : 0;
      spans[index].style.setProperty("--a", (0.8 * share).toFixed(3));
    });
    at("colour-low").textContent = number(low);
    at("colour-high").textContent = number(high) + " · " + source.means;
  };
  const chooseSource = () => {
    const parts = partsOf(names[at("colour").value]);
    fill(at("part"), parts.map((source) => source.part));
    at("part-label").hidden = parts.length < 2;
    chooseUnit();
  };
  const chooseUnit = () => {
    const { source } = colour();
    const units = Array.from({ length: source.table.columns }, (_, index) => `${index + 1}`);
    fill(at("unit"), units.length > 1 ? ["mean", ...units] : ["mean"]);
    at("unit-label").hidden = units.length < 2;
    at("unit-name").textContent = source.unit;
    paint();
  };
  const colourBy = (source, unit) => {
    at("colour").value = String(names.indexOf(source.name));
    chooseSource();
    at("part").value = String(partsOf(source.name).indexOf(source));
    chooseUnit();
    at("unit").value = source.table.columns > 1 ? String(unit + 1) : "0";
    paint();
  };

  const bars = (source, row) => {
    const values = Array.from({ length: source.table.columns }, (_, unit) => source.table.get(row, unit));
    if (!values.some(Number.isFinite)) return [make("p", { className: "most", textContent: `${source.part}: nothing for this token` })];
    const order = values.map((value, unit) => [value, unit]).filter(([value]) => Number.isFinite(value)).sort((a, b) => b[0] - a[0]);
    const top = order.slice(0, 4).map(([value, unit]) => `${unit + 1}: ${number(value)}`).join(", ");
    const line = make("p", { className: "most", textContent: `${source.part} · ${source.unit} ${top}${order.length > 4 ? ", …" : ""}` });
    if (values.length < 2) return [line];
    const high = Math.max(source.table.high, 1e-12), low = Math.min(0, source.table.low);
    const row_ = make("div", { className: "bars", ariaHidden: "true" });
    values.forEach((value, unit) => {
      const bar = make("i", { title: `${source.unit} ${unit + 1}: ${number(value)}` });
      bar.style.height = `${Math.max(1, (100 * ((value || 0) - low)) / (high - low))}%`;
      if (source.unit === "slot" && unit === chosen.slot) bar.className = "chosen";
      bar.onclick = () => { if (source.unit === "slot") chosen.slot = unit; colourBy(source, unit); showToken(); showSegment(); };
      row_.append(bar);
    });
    return [row_, line];
  };
  const showToken = () => {
    const index = chosen.token, segment = segmentOf(index);
    if (!spans.length) return;
    const cost = Number.isFinite(bits[index]) ? `${number(bits[index])} bits` : "predicted by nothing";
    at("token-now").replaceChildren(make("code", { textContent: readable(data.tokens[index]) }),
      ` token ${index}${segment < 0 ? "" : `, segment ${segment + 1}`}: ${cost}`);
    at("token-detail").replaceChildren(...names.slice(1).flatMap((name) => {
      const parts = partsOf(name);
      return [make("h4", { textContent: `${name}: ${parts[0].means}` }), ...parts.flatMap((source) => bars(source, index))];
    }));
  };
  const chooseToken = (index, follow = true) => {
    spans[chosen.token]?.removeAttribute("aria-selected");
    chosen.token = Math.max(0, Math.min(spans.length - 1, index));
    const span = spans[chosen.token];
    if (!span) return;
    span.setAttribute("aria-selected", "true");
    box.setAttribute("aria-activedescendant", span.id);
    const over = span.offsetTop - box.offsetTop;
    if (over < box.scrollTop || over + 24 > box.scrollTop + box.clientHeight) box.scrollTop = over - box.clientHeight / 2;
    const segment = segmentOf(chosen.token);
    if (follow && segment >= 0 && segment !== chosen.segment) { chosen.segment = segment; showSegment(); }
    showToken();
  };
  const line = (step) => { // the token above or below
    const here = spans[chosen.token];
    for (let index = chosen.token + step; spans[index]; index += step) {
      const there = spans[index];
      if (there.offsetTop !== here.offsetTop && step * (there.offsetLeft - here.offsetLeft) >= 0) return index;
      if (Math.abs(there.offsetTop - here.offsetTop) > 60) return index;
    }
    return chosen.token;
  };
  const page = (step) => {
    const segment = data.segments[segmentOf(chosen.token) + step];
    return segment && segment[0] < spans.length ? segment[0] : step > 0 ? spans.length - 1 : 0;
  };
  const moves = {
    ArrowRight: () => chosen.token + 1, ArrowLeft: () => chosen.token - 1, ArrowDown: () => line(1), ArrowUp: () => line(-1),
    PageDown: () => page(1), PageUp: () => page(-1), Home: () => 0, End: () => spans.length - 1,
  };
  box.addEventListener("keydown", (event) => {
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    chooseToken(moves[event.key]());
  });
  box.addEventListener("click", (event) => {
    const index = event.target.dataset?.index;
    if (index !== undefined) chooseToken(Number(index));
  });

  /* ---- slots by segments ---- */
  const grid = at("grid");
  const place = () => places[chosen.place];
  const table = () => place().tables[chosen.measure];
  const draw = () => {
    if (!places.length) return;
    const { rows, columns } = table(), ratio = window.devicePixelRatio || 1;
    const height = Math.max(28, Math.min(360, rows * Math.max(4, Math.min(16, 360 / rows))));
    grid.style.height = `${height}px`;
    const width = grid.clientWidth;
    grid.width = width * ratio;
    grid.height = height * ratio;
    const context = grid.getContext("2d"), style = getComputedStyle(document.documentElement);
    const cool = style.getPropertyValue("--cool").trim();
    const wide = Math.min(grid.width / columns, 24 * ratio), high = grid.height / rows;
    for (let row = 0; row < rows; row++)
      for (let column = 0; column < columns; column++) {
        const value = table().get(row, column);
        if (!Number.isFinite(value)) continue;
        context.fillStyle = `rgb(${cool} / ${0.04 + 0.96 * Math.min(1, Math.max(0, value))})`;
        const [left, top] = [Math.floor(column * wide), Math.floor(row * high)];
        context.fillRect(left, top, Math.floor((column + 1) * wide) - left, Math.floor((row + 1) * high) - top);
      }
    context.strokeStyle = style.getPropertyValue("--c1");
    context.lineWidth = 2 * ratio;
    context.strokeRect(chosen.segment * wide, 1, Math.max(wide, 4), grid.height - 2);
    context.strokeRect(chosen.segment * wide, chosen.slot * high, Math.max(wide, 4), high);
    grid.cell = { wide: wide / ratio, high: high / ratio };
  };
  const took = () => {
    const source = sources.find((each) => each.name === "took" && each.part === place().part);
    const [start, stop] = data.segments[chosen.segment];
    if (!source) return [];
    const found = [];
    for (let index = start; index < Math.min(stop, spans.length); index++) found.push([source.table.get(index, chosen.slot), index]);
    const most = found.filter(([value]) => Number.isFinite(value)).sort((a, b) => b[0] - a[0]).slice(0, 8);
    if (!most.length) return ["What it took of this segment is not shown: it was not written, or its tokens are beyond those shown."];
    const button = make("button", { textContent: "colour all tokens by it", type: "button" });
    button.onclick = () => { colourBy(source, chosen.slot); chooseToken(start, false); box.focus(); };
    return [`Slot ${chosen.slot + 1} took most of `, ...most.flatMap(([value, index]) =>
      [make("code", { textContent: readable(data.tokens[index]) }), ` ${number(value)} `]), button];
  };
  const showSegment = () => {
    if (!places.length) return;
    const { unit, tables, part } = place(), [start, stop] = data.segments[chosen.segment];
    const shares = Object.keys(tables).filter((name) => name !== "recalled" || chosen.measure === "recalled");
    const told = chosen.measure === "recalled" ? ["recalled"] : shares;
    const value = table().get(chosen.slot, chosen.segment);
    at("grid-now").textContent = `Segment ${chosen.segment + 1}, tokens ${start} to ${stop - 1}: ${unit} ${chosen.slot + 1}, ${chosen.measure} ${number(value)}`;
    at("shares-legend").replaceChildren(...told.filter((name) => name !== "recalled").map((name) => {
      let total = 0, count = 0;
      for (let row = 0; row < tables[name].rows; row++) {
        const each = tables[name].get(row, chosen.segment);
        if (Number.isFinite(each)) { total += each; count++; }
      }
      return make("span", { className: `key ${name}`, textContent: `${name} (mean ${number(total / count)})` });
    }));
    at("shares").replaceChildren(...Array.from({ length: table().rows }, (_, slot) => {
      const words = told.map((name) => `${name} ${number(tables[name].get(slot, chosen.segment))}`).join(", ");
      const track = make("span", {}, ...told.map((name) => {
        const part = make("i", { className: `${name}-fill` });
        part.style.width = `${100 * (tables[name].get(slot, chosen.segment) || 0)}%`;
        return part;
      }));
      const button = make("button", { type: "button", title: words, ariaLabel: `${unit} ${slot + 1}: ${words}`, tabIndex: slot === chosen.slot ? 0 : -1 },
        make("b", { textContent: slot + 1 }), track);
      button.setAttribute("aria-pressed", String(slot === chosen.slot));
      button.onclick = () => { chosen.slot = slot; showSegment(); showToken(); at("shares").children[slot].focus(); };
      return button;
    }));
    at("slot-took").replaceChildren(...took());
    draw();
  };
  const chooseMeasure = () => {
    const found = Object.keys(place().tables);
    at("grid-help").textContent = `A column is a segment, a row a ${place().unit}. Click, or use the arrow keys.`;
    grid.setAttribute("aria-label", `${place().unit}s by segments`);
    if (!found.includes(chosen.measure)) chosen.measure = found[0];
    at("measure").replaceChildren(...found.map((name) => {
      const button = make("button", { type: "button", textContent: name });
      button.setAttribute("aria-pressed", String(name === chosen.measure));
      button.onclick = () => { chosen.measure = name; chooseMeasure(); at("measure").children[found.indexOf(name)].focus(); };
      return button;
    }));
    at("measure-means").textContent = `${chosen.measure}: ${place().means[chosen.measure]}`;
    at("grid-low").textContent = "0";
    at("grid-high").textContent = "1";
    chosen.slot = Math.min(chosen.slot, table().rows - 1);
    showSegment();
  };
  const choosePlace = (segment, slot, follow) => {
    chosen.segment = Math.max(0, Math.min(data.segments.length - 1, segment));
    chosen.slot = Math.max(0, Math.min(table().rows - 1, slot));
    showSegment();
    const [start] = data.segments[chosen.segment];
    if (follow && start < spans.length) chooseToken(start, false);
    else showToken();
  };
  if (places.length) {
    at("places").hidden = false;
    fill(at("place-part"), places.map((each) => each.part));
    at("place-part-label").hidden = places.length < 2;
    at("place-part").onchange = () => { chosen.place = Number(at("place-part").value); chooseMeasure(); };
    grid.addEventListener("click", (event) => {
      const edge = grid.getBoundingClientRect();
      choosePlace(Math.floor((event.clientX - edge.left) / grid.cell.wide), Math.floor((event.clientY - edge.top) / grid.cell.high), true);
    });
    const steps = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    grid.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      choosePlace(chosen.segment + step[0], chosen.slot + step[1], step[0] !== 0);
    });
    at("shares").addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      choosePlace(chosen.segment, chosen.slot + step, false);
      at("shares").children[chosen.slot].focus();
    });
    new ResizeObserver(draw).observe(grid.parentElement);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    chooseMeasure();
  }
  fill(at("colour"), names);
  at("colour").onchange = chooseSource;
  at("part").onchange = chooseUnit;
  at("unit").onchange = () => {
    paint();
    const { source, unit } = colour();
    if (source.unit === "slot" && unit >= 0) { chosen.slot = unit; showSegment(); showToken(); }
  };
  chooseSource();
  chooseToken(chosen.token);
})();
