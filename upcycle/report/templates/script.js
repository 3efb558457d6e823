"use strict";
// What the page can do beyond being read: values under the pointer, numbers, CSV and PNG of every figure, sorted and searched
// tables, one layer at a time. Without it, everything is still there to read.
(() => {
  const make = (tag, attributes = {}, text = "") => {
    const part = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) part.setAttribute(name, value);
    part.textContent = text;
    return part;
  };
  const button = (text, label, act) => {
    const part = make("button", { type: "button", "aria-label": label }, text);
    part.addEventListener("click", act);
    return part;
  };
  const shown = value => {
    if (value === null || value === undefined) return "none";
    if (typeof value !== "number") return String(value);
    const size = Math.abs(value);
    return size >= 1e6 || (size && size < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));
  };

  // Cells of a large grid come as a character each: its place on the scale, the last of them for none.
  const codes = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_";
  const decoded = v => {
    if (!v.codes) return v;
    const [low, high] = v.scale, steps = codes.length - 2;
    const value = code => codes.indexOf(code) > steps ? null : low + codes.indexOf(code) / steps * (high - low);
    return { ...v, cells: v.codes.map(row => [...row].map(value)) };
  };

  // A figure's values as a table, and in words at a place (0 to 1 from the left and from the top).
  const kinds = {
    grid: {
      table: v => [[`${v.rows} / ${v.columns}`, ...v.names[1]], ...v.cells.map((row, i) => [v.names[0][i], ...row])],
      at: (v, x, y) => {
        const i = Math.min(v.cells.length - 1, Math.floor(y * v.cells.length));
        const j = Math.min(v.names[1].length - 1, Math.floor(x * v.names[1].length));
        return [`${v.rows} ${v.names[0][i]}, ${v.columns} ${v.names[1][j]}`, `${shown(v.cells[i][j])} ${v.unit}`];
      },
    },
    lines: {
      table: v => {
        const places = [...new Set(v.series.flatMap(one => one.x))].sort((a, b) => a - b);
        const rows = places.map(x => [x, ...v.series.map(one => one.y[one.x.indexOf(x)] ?? null)]);
        return [[v.x, ...v.series.map(one => one.name)], ...rows];
      },
      at: (v, x) => {
        const wanted = v.range[0] + x * (v.range[1] - v.range[0]);
        const nearest = one => one.x.reduce((best, value, i) => Math.abs(value - wanted) < Math.abs(one.x[best] - wanted) ? i : best, 0);
        const found = v.series.filter(one => one.x.length).map(one => [one, nearest(one)]);
        if (!found.length) return [];
        const said = found.map(([one, i]) => `${v.series.length > 1 ? one.name + ": " : ""}${shown(one.y[i])}`);
        return [`${v.x} ${shown(found[0][0].x[found[0][1]])}`, ...said];
      },
    },
    bars: {
      table: v => [["", v.unit], ...v.names.map((name, i) => [name, v.values[i]])],
      at: () => [],
    },
  };

  const tip = make("div", { class: "tip", "aria-hidden": "true" });
  document.body.append(tip);
  const follow = (area, values) => {
    area.addEventListener("pointermove", event => {
      const box = area.getBoundingClientRect();
      const said = kinds[values.kind].at(values, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
      tip.replaceChildren(...said.map((line, i) => make(i ? "div" : "b", {}, line)));
      tip.style.display = said.length ? "block" : "none";
      const left = Math.min(event.clientX + 12, document.documentElement.clientWidth - tip.offsetWidth - 4);
      tip.style.left = `${Math.max(4, left) + window.scrollX}px`;
      tip.style.top = `${event.clientY + 16 + window.scrollY}px`;
    });
    area.addEventListener("pointerleave", () => { tip.style.display = "none"; });
  };

  const save = (blob, name) => {
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const quoted = cell => {
    const text = cell === null ? "" : String(cell);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = rows => rows.map(row => row.map(quoted).join(",")).join("\n") + "\n";

  // The figure with the page's style, as an SVG image, on a canvas.
  const png = async figure => {
    const box = figure.getBoundingClientRect();
    const copy = figure.cloneNode(true);
    copy.querySelectorAll("script, .tools, .numbers").forEach(part => part.remove());
    const style = make("style", {}, document.querySelector("style").textContent);
    const body = document.implementation.createHTMLDocument("").body;
    body.append(style, copy);
    body.setAttribute("style", `padding:8px;margin:0;max-width:none;width:${box.width + 16}px`);
    const [width, height] = [Math.ceil(box.width + 16), Math.ceil(box.height + 16)];
    const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}">`
      + `<foreignObject width="100%" height="100%">${new XMLSerializer().serializeToString(body)}</foreignObject></svg>`;
    const image = new Image();
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
    await image.decode();
    const canvas = make("canvas", { width: 2 * width, height: 2 * height });
    const context = canvas.getContext("2d");
    context.fillStyle = getComputedStyle(document.body).backgroundColor;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.scale(2, 2);
    context.drawImage(image, 0, 0);
    return new Promise(done => canvas.toBlob(done, "image/png"));
  };

  const tabled = rows => {
    const table = make("table");
    const head = table.createTHead().insertRow();
    rows[0].forEach(cell => head.append(make("th", { scope: "col" }, cell)));
    const body = table.createTBody();
    rows.slice(1).forEach(row => {
      const line = body.insertRow();
      row.forEach((cell, i) => line.append(i ? make("td", { class: "number" }, shown(cell)) : make("th", { scope: "row" }, shown(cell))));
    });
    return table;
  };

  for (const figure of document.querySelectorAll("figure.plot")) {
    const block = figure.querySelector("script.values");
    if (!block) continue;
    const values = decoded(JSON.parse(block.textContent));
    const title = figure.querySelector("figcaption strong").textContent;
    const name = title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
    const rows = () => kinds[values.kind].table(values);
    follow(figure.querySelector(".area"), values);
    const tools = make("div", { class: "tools" });
    const numbers = button("Numbers", `Show the numbers of: ${title}`, () => {
      const open = figure.querySelector(".numbers");
      numbers.setAttribute("aria-expanded", String(!open));
      if (open) { open.remove(); return; }
      const place = make("div", { class: "scroll numbers", tabindex: "0", role: "region", "aria-label": `Numbers of: ${title}` });
      place.append(tabled(rows()));
      tools.after(place);
    });
    numbers.setAttribute("aria-expanded", "false");
    tools.append(
      numbers,
      button("CSV", `Save as CSV: ${title}`, () => save(new Blob([csv(rows())], { type: "text/csv" }), `${name}.csv`)),
      button("PNG", `Save as PNG: ${title}`, async () => save(await png(figure), `${name}.png`)),
    );
    figure.append(tools);
    figure.reportParts = { rows, csv: () => csv(rows()), png: () => png(figure) };
  }

  // Tables: a click on a heading sorts; long ones are searched.
  const value = cell => {
    const text = (cell?.textContent ?? "").trim();
    const found = /^[-+]?[\d.,]+(e[-+]?\d+)?/i.exec(text.replaceAll(",", ""));
    return found && Number.isFinite(+found[0]) ? +found[0] : text.toLowerCase();
  };
  const before = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  for (const table of document.querySelectorAll(".scroll > table")) {
    const body = table.tBodies[0];
    if (!table.tHead || body.rows.length < 3) continue;
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      if (!heading.textContent.trim()) return;
      const sorter = make("button", { type: "button", class: "sort" });
      sorter.append(...heading.childNodes);
      sorter.addEventListener("click", () => {
        const down = heading.getAttribute("aria-sort") === "ascending";
        [...table.tHead.rows[0].cells].forEach(each => each.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const sorted = [...body.rows].sort((a, b) => before(value(a.cells[column]), value(b.cells[column])) * (down ? -1 : 1));
        body.append(...sorted);
      });
      heading.append(sorter);
    });
    if (body.rows.length > 12) {
      const label = make("label", { class: "search" }, "Search ");
      const field = make("input", { type: "search" });
      const count = make("span", { "aria-live": "polite" });
      field.addEventListener("input", () => {
        const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
        let left = 0;
        for (const row of body.rows) {
          const text = row.textContent.toLowerCase();
          row.hidden = !words.every(word => text.includes(word));
          left += !row.hidden;
        }
        count.textContent = ` ${left} of ${body.rows.length}`;
      });
      label.append(field);
      table.parentElement.before(label, count);
    }
  }

  // One layer at a time.
  for (const place of document.querySelectorAll(".layers")) {
    const layers = [...place.querySelectorAll(":scope > details")];
    if (layers.length < 2) continue;
    const label = make("label", { class: "search" }, "Layer ");
    const picker = make("select");
    layers.forEach((part, i) => picker.append(make("option", { value: i }, part.dataset.layer)));
    const pick = () => layers.forEach((part, i) => { part.hidden = i !== +picker.value; part.open = true; });
    picker.addEventListener("change", pick);
    label.append(picker);
    place.prepend(label);
    pick();
  }
})();
