"""The looks of the page: light and dark by what the reader's system asks for, no script, nothing loaded from elsewhere."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #fff; --text: #1c2025; --muted: #5f6670; --line: #deded8;
  --live: #2a8a56; --dead: #b6bcc5; --notes: #3f77b3; --torn: #b9820b; --damaged: #c6342b; --free: #e9e9e3; }
@media (prefers-color-scheme: dark) { :root { --page: #131619; --card: #1c2024; --text: #e7e9eb; --muted: #9aa2ab; --line: #343a40;
  --live: #41b178; --dead: #5a626c; --notes: #6aa2dc; --torn: #e2b347; --damaged: #f0655b; --free: #282d32; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 30px 20px 60px }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere } h2 { font-size: 17px; margin: 34px 0 10px }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 6px }
.sub { color: var(--muted); margin: 4px 0 20px; overflow-wrap: anywhere; font-size: 14px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 10px }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.tile { padding: 12px 16px } .tile b { display: block; font-size: 22px; font-weight: 600; line-height: 1.3 }
.tile span { color: var(--muted); font-size: 13px }
.card { padding: 16px 18px; overflow-x: auto } 
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 10px }
.card > svg { width: 100%; height: auto }
ul.alerts { list-style: none; margin: 0 0 16px; padding: 0 } ul.alerts li { background: var(--card); border: 1px solid var(--line);
  border-left: 5px solid var(--muted); border-radius: 8px; padding: 8px 14px; margin-bottom: 6px; overflow-wrap: anywhere }
ul.alerts li.bad { border-left-color: var(--damaged) } ul.alerts li.warning { border-left-color: var(--torn) }
ul.alerts b { text-transform: uppercase; font-size: 12px; letter-spacing: .04em; margin-right: 8px }
.bad b { color: var(--damaged) } .warning b { color: var(--torn) } .note b { color: var(--muted) }
.lead { font-size: 16px; font-weight: 600; margin: 0 0 6px } .advice { margin: 0 0 12px; padding-left: 20px; max-width: 85ch }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
th { text-align: left; color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--line) }
th, td { padding: 5px 14px 5px 0; white-space: nowrap; vertical-align: middle } td.n, th.n { text-align: right } td.wide { width: 45% }
td.name { max-width: 320px; overflow: hidden; text-overflow: ellipsis } td.why { white-space: normal; overflow-wrap: anywhere }
code { font: 12.5px ui-monospace, monospace } svg { display: block } .plain { color: var(--muted); margin: 0 }
.meter { background: var(--free); border-radius: 4px; height: 12px; overflow: hidden; min-width: 120px } 
.meter i { display: block; height: 100%;
  background: var(--notes); border-radius: 4px }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-top: 12px; font-size: 13px; color: var(--muted) }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; vertical-align: -1px }
.live { fill: var(--live); background: var(--live) } .dead { fill: var(--dead); background: var(--dead) }
.notes { fill: var(--notes); background: var(--notes) } .free { fill: var(--free); background: var(--free) }
.torn { fill: var(--torn); background: var(--torn) } .damaged { fill: var(--damaged); background: var(--damaged) }
"""
