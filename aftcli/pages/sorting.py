"""The script of a page's table: it sorts and filters rows, and keeps both in the address."""

STYLE = """
.overview { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-end;
  justify-content: space-between; }
.overview > div { max-width: 34rem; } .overview th, .overview td { padding: 0.25rem 0.35rem; }
.histogram { margin: 0; } .histogram rect { fill: #3b6ea5; } .histogram line { stroke: #444; }
.histogram text { font-size: 11px; text-anchor: middle; fill: #333; }
.results { width: 100%; } .results td { vertical-align: middle; }
.results td.text { overflow-wrap: anywhere; }
.results thead { position: sticky; top: 0; background: #fff; }
.results button { font: inherit; font-weight: bold; border: 0; background: none; padding: 0;
  cursor: pointer; text-align: inherit; }
.results th[aria-sort=ascending] button::after { content: " \\25b2"; }
.results th[aria-sort=descending] button::after { content: " \\25bc"; }
.results input { width: 4rem; font-size: 0.8rem; box-sizing: border-box; }
.results th, .results td { padding: 0.25rem 0.4rem; } .overview td.text { overflow-wrap: anywhere;
  min-width: 6.5rem; }
.results .text input { width: 100%; min-width: 4rem; }
.results th[data-name=image] { min-width: 15rem; }
.results th[data-name=network] { min-width: 9rem; }
.results input[aria-invalid=true] { outline: 2px solid #c33; }
"""

# A filter of numbers without a sign takes what rounds to it: 0.37 takes 0.3708.
SCRIPT = """
(() => {
  "use strict";
  const table = document.querySelector("table.results"), body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells], rows = [...body.rows];
  const inputs = [...table.tHead.querySelectorAll("input")];
  const place = name => heads.findIndex(head => head.dataset.name === name);
  const value = (row, i) => row.cells[i].dataset.value;
  const signs = {
    "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b,
    "=": (a, b, rounding) => Math.abs(a - b) <= rounding,
  };
  let sorted = "";

  function test(text, kind) {
    if (kind === "text") {
      return found => found.toLowerCase().includes(text.toLowerCase());
    }
    const parts = /^(<=|>=|<|>|=)?\\s*(-?\\d*\\.?(\\d*)(?:e[+-]?\\d+)?)\\s*(%?)$/i.exec(text);
    if (!parts || parts[2] === "" || Number.isNaN(Number(parts[2]))) return null;
    const percent = parts[4] || (kind === "share" && Number(parts[2]) > 1);
    const unit = percent ? 100 : 1, number = Number(parts[2]) / unit;
    const rounding = 0.5 * 10 ** -parts[3].length / unit;
    const sign = signs[parts[1] || "="];
    return found => found !== "" && sign(Number(found), number, rounding);
  }

  function before(i, kind, down) {
    return (one, two) => {
      const a = value(one, i), b = value(two, i);
      if (a === "" || b === "") return (a === "") - (b === "");
      const order = kind === "text"
        ? a.localeCompare(b, "en", { numeric: true }) : Number(a) - Number(b);
      return down ? -order : order;
    };
  }

  function show() {
    const tests = [], address = new URLSearchParams();
    for (const input of inputs) {
      const text = input.value.trim(), i = place(input.name);
      const wanted = text && test(text, heads[i].dataset.kind);
      input.setAttribute("aria-invalid", wanted === null);
      if (wanted) tests.push(row => wanted(value(row, i)));
      if (text) address.set(input.name, text);
    }
    let count = 0;
    for (const row of rows) {
      row.hidden = !tests.every(each => each(row));
      count += !row.hidden;
    }
    const down = sorted.startsWith("-"), by = place(sorted.replace("-", ""));
    heads.forEach((head, i) => head.dataset.name && head.setAttribute(
      "aria-sort", !sorted || i !== by ? "none" : down ? "descending" : "ascending"));
    const order = sorted && by > 0
      ? [...rows].sort(before(by, heads[by].dataset.kind, down)) : rows;
    for (const row of order) body.append(row);
    if (sorted) address.set("sort", sorted);
    document.getElementById("count").textContent = `${count} of ${rows.length} results`;
    try { history.replaceState(null, "", `#${address}`); } catch { /* not allowed everywhere */ }
  }

  function read() {
    const address = new URLSearchParams(location.hash.slice(1));
    for (const input of inputs) input.value = address.get(input.name) || "";
    sorted = address.get("sort") || "";
    if (place(sorted.replace("-", "")) < 0) sorted = "";
    show();
  }

  for (const head of heads.filter(each => each.dataset.name)) {
    head.firstChild.addEventListener("click", () => {
      const name = head.dataset.name;
      const turns = head.dataset.kind === "text" ? [name, `-${name}`, ""] : [`-${name}`, name, ""];
      sorted = turns[(turns.indexOf(sorted) + 1) % 3] ;
      show();
    });
  }
  for (const input of inputs) input.addEventListener("input", show);
  window.addEventListener("hashchange", read);
  document.getElementById("filters").hidden = false;
  read();
})();
"""
