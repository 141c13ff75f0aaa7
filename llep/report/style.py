"""Style and script of the page."""

STYLE = """
:root { color-scheme: light dark; --text: #1c2127; --muted: #5d6673; --line: #d9dee5; --page: #fff; --soft: #f4f6f9;
  --before: #d9822b; --after: #2f6fd0; --good: #1a7f4b; --bad: #b3261e; --unsure: #8a6100 }
@media (prefers-color-scheme: dark) { :root { --text: #e7eaef; --muted: #9aa5b5; --line: #3a4351; --page: #13171d;
  --soft: #1d242e; --before: #e0954a; --after: #6aa0f0; --good: #57c98a; --bad: #ff8a80; --unsure: #e2b04a } }
@media print { :root { color-scheme: light; --text: #000; --muted: #444; --line: #bbb; --page: #fff; --soft: #fff;
  --before: #c46a10; --after: #1f57b0; --good: #14663b; --bad: #8c1d18; --unsure: #6b4b00 }
  section { break-inside: avoid } body { font-size: 12px } details[open] summary { display: none }
  #tip { display: none } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0 }
main { max-width: 940px; margin: 0 auto; padding: 1.6rem 1.2rem 4rem }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.08rem; margin: 0 0 .3rem }
section { margin-top: 2.2rem } p { margin: .2rem 0 .7rem; color: var(--muted) } header p { margin-top: .2rem }
.verdict { border: 1px solid var(--line); border-left: .4rem solid var(--kind); border-radius: 6px;
  padding: 1rem 1.2rem;  background: var(--soft); margin-top: 1.2rem }
.verdict h2 { font-size: 1.5rem; color: var(--kind) } .verdict p { color: var(--text) }
.good { --kind: var(--good) } .bad { --kind: var(--bad) } .unsure { --kind: var(--unsure) }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.4rem, 1fr)); gap: .8rem; margin: .9rem 0 0 }
dt { color: var(--muted); font-size: .84rem } dd { margin: 0; font-size: 1.4rem; font-weight: 600 }
small { color: var(--muted); display: block; line-height: 1.3 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: 13px }
th, td { text-align: right; padding: .28rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { color: var(--muted); font-weight: 500 }
.scroll { overflow-x: auto }
.bar { display: inline-block; width: 5.5rem; height: .6rem; background: var(--line); border-radius: 2px;
  vertical-align: middle; text-align: left; margin-left: .3rem; print-color-adjust: exact }
.bar span { display: block; height: 100%; border-radius: 2px }
span.before, i.before { background: var(--before) } span.after, i.after { background: var(--after) }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 4px; padding: .6rem .8rem;
  margin: .2rem 0 .8rem;  white-space: pre-wrap; overflow-wrap: anywhere } code { font: 13px ui-monospace, monospace }
svg { display: block; width: 100%; height: auto; overflow: visible; print-color-adjust: exact }
svg text { fill: var(--text); font: 12px system-ui, sans-serif } svg .muted { fill: var(--muted) }
svg .grid { stroke: var(--line) } svg .frame { fill: none; stroke: var(--line) }
svg image { image-rendering: pixelated }
svg rect.before { fill: var(--before) } svg rect.after { fill: var(--after) }
svg g.before { stroke: var(--before); fill: none } svg g.after { stroke: var(--after); fill: none }
svg polyline { stroke-width: 1.6; stroke-linejoin: round }
svg .threshold { stroke: var(--text); stroke-dasharray: 5 4; opacity: .65 }
.legend { font-size: 13px } .legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px;
  vertical-align: -1px; margin: 0 .3rem 0 .9rem; print-color-adjust: exact } .legend i:first-child { margin-left: 0 }
.legend i.mean { border: 1px solid var(--line) }
.legend i.dash { height: 0; border-top: 2px dashed var(--text); border-radius: 0; width: 1.2rem; vertical-align: 4px }
.axis { text-align: center; font-size: 12px; margin: -.1rem 0 0 }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); gap: 1.2rem }
figure { margin: 0; min-width: 0 } figcaption { color: var(--muted); font-size: 13px; margin-bottom: .2rem }
summary { cursor: pointer; color: var(--muted) } ul { color: var(--muted); padding-left: 1.2rem; margin: .2rem 0 }
#tip { position: fixed; pointer-events: none; background: var(--text); color: var(--page); padding: .15rem .5rem;
  border-radius: 4px; font-size: 12px; opacity: 0; white-space: nowrap }
"""

# The number under the pointer: the picture carries its values, in hundredths.
SCRIPT = """
'use strict';
const tip = document.getElementById('tip');
for (const svg of document.querySelectorAll('svg.heat')) {
  const of = svg.dataset, rows = of.rows.split(','), columns = +of.columns;
  const bytes = Uint8Array.from(atob(of.values), c => c.charCodeAt(0)), values = new Uint16Array(bytes.buffer);
  svg.addEventListener('pointermove', event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const column = Math.floor((at.x - of.left) / of.inner * columns), row = Math.floor(at.y / of.height * rows.length);
    const inside = column >= 0 && column < columns && row >= 0 && row < rows.length;
    tip.style.opacity = inside ? 1 : 0;
    if (!inside) return;
    tip.textContent = `layer ${rows[row]}, ${of.column} ${column}: ` +
      `${(values[row * columns + column] / 100).toFixed(2)} ${of.unit}`;
    tip.style.left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8) + 'px';
    tip.style.top = (event.clientY + 14) + 'px';
  });
  svg.addEventListener('pointerleave', () => { tip.style.opacity = 0; });
}
addEventListener('beforeprint', () => { for (const each of document.querySelectorAll('details')) each.open = true; });
"""
