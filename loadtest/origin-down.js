// Pulls cached images while their registry is down and after it is back; loadtest/run.sh stops and starts it. Every pull must
// succeed. Images that are not cached must fail soon, with a status that makes a runtime use its fall-back.
//
// VUS       clients at a time   (8)
// DURATION  in seconds          (30)
import http from "k6/http";
import { check, sleep } from "k6";
import { accept, common, images, parse, pull, thresholds, url } from "./lib/registry.js";
import { summary } from "./lib/summary.js";
import { Trend } from "k6/metrics";

const duration = `${Number(__ENV.DURATION || 30)}s`;
const [known, unknown] = [new Trend("pull_known", true), new Trend("refused_unknown", true)];

export const options = {
  ...common,
  scenarios: {
    known: { executor: "constant-vus", vus: Number(__ENV.VUS || 8), duration, exec: "pullKnown" },
    unknown: { executor: "constant-vus", vus: 2, duration, exec: "requestUnknown" },
  },
  thresholds: thresholds({ refused_unknown: ["max<12500"] }),
};

export function setup() {
  images.forEach((image) => pull(image));
}

export function pullKnown() {
  known.add(pull(images[__ITER % images.length]));
}

export function requestUnknown() {
  const image = `${images[0].replace(/:[^:]*$/, "")}:never-${__VU}-${__ITER}`;
  const response = http.head(url(image, `manifests/${parse(image).tag}`), { headers: { Accept: accept }, tags: { name: "unknown" } });
  check(response, { "refused as runtimes understand": (r) => r.status === 404 || r.status === 503 });
  unknown.add(response.timings.duration);
  sleep(0.2);
}

export const handleSummary = summary("a registry goes and comes back");
