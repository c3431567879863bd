"""How the page of a report looks: on a wide screen, on a phone, on paper, by day and by night."""

STYLE = """\
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #555; --ground: #fff; --line: #d4d4d4;
  --shade: #f4f4f4; --link: #0a58a6; --pass: #00694c; --fail: #a63a00; --inconclusive: #555; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #b0b0b0; --ground: #161616; --line: #444; --shade: #222;
    --link: #7cc0f5; --pass: #4fd0a5; --fail: #ff9a62; --inconclusive: #b8b8b8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
p { max-width: 44rem; overflow-wrap: anywhere; }
a { color: var(--link); }
.summary { background: var(--shade); border: 1px solid var(--line); border-radius: .4rem;
  padding: .2rem 1rem .6rem; }
.counts { display: flex; flex-wrap: wrap; gap: .6rem; list-style: none; padding: 0; margin: 0; }
.counts li { border: 2px solid; border-radius: .4rem; padding: .2rem .8rem;
  background: var(--ground); }
.counts b { font-size: 1.5rem; margin-right: .2rem; }
.by-section { padding-left: 1.1rem; margin: .7rem 0 .3rem; }
.counts .pass, .pass .verdict { color: var(--pass); }
.counts .fail, .fail .verdict { color: var(--fail); }
.counts .inconclusive, .inconclusive .verdict { color: var(--inconclusive); }
.verdict { font-weight: 600; white-space: nowrap; }
nav ol { columns: 18rem; padding-left: 1.4rem; }
.wide { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0;
  border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--soft); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.claims td { overflow-wrap: break-word; }
.claims td[data-label="verdict"] { min-width: 9rem; }
.claims small { display: block; color: var(--soft); max-width: 20rem; }
figure { margin: 1rem 0 1.6rem; }
figure img { max-width: min(100%, 54rem); height: auto; background: #fff;
  border: 1px solid var(--line); }
figcaption { font-size: .92rem; color: var(--soft); max-width: 50rem; }
.files { white-space: nowrap; }
.settings { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr;
  gap: .1rem 1rem; font-size: .88rem; }
.settings dt { color: var(--soft); overflow-wrap: anywhere; }
.settings dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  .claims thead { position: absolute; left: -999rem; }
  .claims, .claims tbody, .claims tr, .claims td { display: block; width: 100%; }
  .claims tr { border: 1px solid var(--line); border-radius: .4rem; margin-bottom: .7rem;
    padding: .3rem .7rem; }
  .claims td { border: 0; padding: .1rem 0; }
  .claims td::before { content: attr(data-label) ": "; color: var(--soft); }
  .settings { grid-template-columns: 1fr; }
  .settings dd { margin-bottom: .4rem; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #333; --ground: #fff; --line: #999;
    --shade: #fff; --link: #000; --pass: #00694c; --fail: #a63a00; --inconclusive: #333; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .wide { overflow: visible; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""
