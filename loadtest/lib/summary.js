// The results of a run: text on standard output, and if OUT names a file without its ending, OUT.json and OUT.html.
export function summary(title) {
  return (data) => {
    const files = { stdout: text(title, data) };
    if (__ENV.OUT) {
      files[`${__ENV.OUT}.json`] = JSON.stringify({ title, ...data }, null, 1);
      files[`${__ENV.OUT}.html`] = html(title, data);
    }
    return files;
  };
}

const failed = (data) => thresholds(data).filter((threshold) => !threshold.ok);

function thresholds(data) {
  return Object.entries(data.metrics).flatMap(([metric, { thresholds: wanted }]) =>
    Object.entries(wanted || {}).map(([rule, { ok }]) => ({ metric, rule, ok })));
}

function checks(group) {
  return [...(group.checks || []), ...(group.groups || []).flatMap(checks)];
}

function value(metric, number) {
  if (number === undefined) return "–";
  if (metric.contains === "time") return number < 10 ? `${number.toFixed(2)} ms` : `${Math.round(number)} ms`;
  if (metric.contains === "data") return bytes(number);
  return Number.isInteger(number) ? String(number) : number.toFixed(2);
}

function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (number >= 1000 && unit < units.length - 1) { number /= 1000; unit += 1; }
  return `${number.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

// The relevant counters and trends, sorted by name.
function rows(data) {
  const builtin = ["iterations", "http_reqs", "http_req_duration", "data_received"];
  const own = (name) => !/^(http_|data_|iteration|vus|checks|group_)/.test(name);
  return Object.entries(data.metrics).filter(([name, metric]) => (builtin.includes(name) || own(name)) && !name.includes("{") && metric.values)
    .sort(([a], [b]) => a.localeCompare(b));
}

const isBytes = (name, metric) => name === "pulled_bytes" || metric.contains === "data";

function sum(name, metric) {
  const number = metric.values.count ?? metric.values.value ?? metric.values.rate;
  return isBytes(name, metric) ? bytes(number) : value(metric, number);
}

function rate(name, metric) {
  const { rate: number, count } = metric.values;
  if (number === undefined || count === undefined) return "";
  return `${isBytes(name, metric) ? bytes(number) : number.toFixed(1)}/s`;
}

function text(title, data) {
  const lines = [`${title}: ${failed(data).length ? "FAILED" : "passed"}`];
  thresholds(data).forEach(({ metric, rule, ok }) => lines.push(`  ${ok ? "ok    " : "FAILED"} ${metric}: ${rule}`));
  checks(data.root_group).forEach((c) => lines.push(`  ${c.fails ? "FAILED" : "ok    "} ${c.name}: ${c.passes} of ${c.passes + c.fails}`));
  rows(data).forEach(([name, metric]) => {
    const v = metric.values;
    const shown = metric.type === "trend"
      ? `median ${value(metric, v.med)}, 95 of 100 ${value(metric, v["p(95)"])}, longest ${value(metric, v.max)}`
      : [sum(name, metric), rate(name, metric)].filter(Boolean).join(", ");
    lines.push(`  ${name.padEnd(20)} ${shown}`);
  });
  return `${lines.join("\n")}\n`;
}

const safe = (s) => String(s).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function html(title, data) {
  const bad = failed(data).length;
  const trends = rows(data).filter(([, metric]) => metric.type === "trend");
  const counters = rows(data).filter(([, metric]) => metric.type !== "trend");
  const longest = Math.max(1e-9, ...trends.map(([, metric]) => metric.values["p(95)"]));
  const row = (cells) => `<tr>${cells.map((c) => `<td>${c}</td>`).join("")}</tr>`;
  const mark = (ok) => `<b class="${ok ? "good" : "bad"}">${ok ? "ok" : "failed"}</b>`;
  return `<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>${safe(title)}</title><style>
:root { color-scheme: light dark; } body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; } th { font-weight: 600; opacity: .7; }
.good { color: #1a7f5a; } .bad { color: #c0392b; } @media (prefers-color-scheme: dark) { .good { color: #4fc492; } .bad { color: #f28b82; } }
.bar { display: inline-block; height: .7em; background: #2468b4; border-radius: 2px; }
</style><h1>${safe(title)}: <span class="${bad ? "bad" : "good"}">${bad ? "failed" : "passed"}</span></h1>
<p>${safe(new Date().toISOString())}, ${(data.state.testRunDurationMs / 1000).toFixed(1)} s</p>
<h2>Thresholds and checks</h2><table><tr><th>threshold</th><th>of</th><th></th></tr>
${thresholds(data).map((t) => row([safe(t.rule), safe(t.metric), mark(t.ok)])).join("")}
${checks(data.root_group).map((c) => row([safe(c.name), `${c.passes} of ${c.passes + c.fails}`, mark(!c.fails)])).join("")}</table>
<h2>Times</h2><table><tr><th></th><th>median</th><th>95 of 100</th><th>99 of 100</th><th>longest</th><th></th></tr>
${trends.map(([name, m]) => row([safe(name), value(m, m.values.med), value(m, m.values["p(95)"]), value(m, m.values["p(99)"]), value(m, m.values.max),
    `<span class="bar" style="width:${(8 * m.values["p(95)"] / longest).toFixed(2)}rem"></span>`])).join("")}</table>
<h2>Counts</h2><table><tr><th></th><th>in all</th><th>a second</th></tr>
${counters.map(([name, m]) => row([safe(name), sum(name, m), rate(name, m)])).join("")}</table>
</html>
`;
}
