"""A report as a page: layers as an icicle by bytes, coloured by what was decided. It needs no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fp8_compile: layers</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#fff, #16181d); --quantized: light-dark(#2f8f5b, #3fae72);
  --unquantized: light-dark(#c9733a, #d98a52); --mixed: light-dark(#b9c0cb, #4a5160); }
body { font: 14px/1.4 system-ui, sans-serif; margin: 1rem auto; max-width: 1200px; padding: 0 1rem;
  background: light-dark(#fff, #16181d); color: light-dark(#1b1d22, #e6e8ec); }
#icicle { position: relative; overflow: hidden; }
#icicle button { position: absolute; border: solid var(--line); border-width: 0 1px 1px 0;
  padding: 1px 3px; font: 11px/1.2 system-ui, sans-serif; color: #fff; text-align: left; overflow: hidden;
  white-space: nowrap; text-overflow: ellipsis; cursor: pointer; }
.quantized { background: var(--quantized); } .unquantized { background: var(--unquantized); }
#icicle .mixed { background: var(--mixed); color: light-dark(#1b1d22, #fff); }
.key { display: inline-block; width: 1em; height: 1em; vertical-align: -2px; margin: 0 .3em 0 1em; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 2px 10px 2px 0; border-bottom: 1px solid light-dark(#e3e6ea, #2b2f37); }
td.n, th.n { text-align: right; } th { cursor: pointer; white-space: nowrap; } td:last-child { min-width: 12rem; }
#about { min-height: 2.8em; overflow-wrap: anywhere; }
</style></head><body>
<h1>Layers</h1>
<p><span id="totals"></span><span class="key quantized"></span>quantized
<span class="key unquantized"></span>unquantized</p>
<div id="icicle"></div>
<p id="about" aria-live="polite"></p>
<div class="scroll"><table><thead><tr></tr></thead><tbody></tbody></table></div>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const megabytes = (bytes) => (bytes / 1e6).toFixed(2) + " MB";
const root = {name: "model", path: "", children: new Map(), bytes: 0, decisions: new Set(), up: null};
for (const row of data.layers) {
  let node = root;
  const parts = row.path.split(".");
  const count = (n) => { n.bytes += row.bytes_before; n.decisions.add(row.decision); };
  count(node);
  parts.forEach((part, i) => {
    if (!node.children.has(part))
      node.children.set(part, {name: part, path: parts.slice(0, i + 1).join("."), children: new Map(), bytes: 0,
        decisions: new Set(), up: node});
    node = node.children.get(part);
    count(node);
  });
  node.row = row;
}
const box = document.getElementById("icicle"), about = document.getElementById("about");
const HEIGHT = 52;
function tell(node) {
  const row = node.row;
  about.textContent = (node.path || "model") + ": " + megabytes(node.bytes) + (row
    ? " -> " + megabytes(row.bytes_after) + ", " + row.in_features + " x " + row.out_features + ", " + row.decision
      + (row.scheme && " (" + row.scheme + ")") + (row.reason && ": " + row.reason)
    : ", " + [...node.decisions].join(" and "));
}
function draw(top) {
  box.replaceChildren();
  let deepest = 0;
  const place = (node, x, width, depth) => {
    const part = document.createElement("button");
    part.className = node.decisions.size > 1 ? "mixed" : [...node.decisions][0];
    part.style.cssText = `left:${x}%;width:${width}%;top:${depth * HEIGHT}px;height:${HEIGHT}px`;
    part.textContent = node.name;
    part.title = node.path;
    part.onmouseenter = part.onfocus = () => tell(node);
    part.onclick = () => draw(node === top ? top.up || top : node);
    box.append(part);
    deepest = Math.max(deepest, depth + 1);
    let at = x;
    for (const child of node.children.values()) {
      const share = node.bytes ? width * child.bytes / node.bytes : 0;
      if (share > 0.05) place(child, at, share, depth + 1);
      at += share;
    }
  };
  place(top, 0, 100, 0);
  box.style.height = deepest * HEIGHT + "px";
  tell(top);
}
document.getElementById("totals").textContent = data.totals.quantized + " quantized, " + data.totals.unquantized
  + " unquantized; " + megabytes(data.totals.bytes_before) + " -> " + megabytes(data.totals.bytes_after) + ". ";
const columns = [["layer", "path"], ["in", "in_features"], ["out", "out_features"], ["decision", "decision"],
  ["scheme", "scheme"], ["before", "bytes_before"], ["after", "bytes_after"], ["reason", "reason"]];
const body = document.querySelector("tbody"), rows = [...data.layers];
function list() {
  body.replaceChildren(...rows.map((row) => {
    const line = document.createElement("tr");
    for (const [, key] of columns) {
      const cell = line.insertCell();
      cell.textContent = key.startsWith("bytes") ? megabytes(row[key]) : row[key];
      if (typeof row[key] === "number") cell.className = "n";
    }
    return line;
  }));
}
let last = null;
for (const [title, key] of columns) {
  const head = document.createElement("th");
  head.textContent = title;
  if (rows.length && typeof rows[0][key] === "number") head.className = "n";
  head.onclick = () => {
    const sign = last === key ? -1 : 1;
    last = sign > 0 ? key : null;
    rows.sort((a, b) => sign * (typeof a[key] === "number" ? b[key] - a[key] : a[key].localeCompare(b[key])));
    list();
  };
  document.querySelector("thead tr").append(head);
}
if (rows.length) draw(root);
list();
</script></body></html>
"""


def page(layers: Sequence[Mapping[str, Any]], totals: Mapping[str, int]) -> str:
    """The page.

    Args:
        layers: attributes of `fp8_compile.report.LayerReport`.
        totals: those of `fp8_compile.report.Report`.
    """
    data = json.dumps({"layers": list(layers), "totals": totals})
    return _PAGE.replace("@DATA@", data.replace("<", "\\u003c"))  # no name of a layer ends the script
