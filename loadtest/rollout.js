// A rollout: NODES nodes pull one image at the same time, each once, spread over the drays of BASES.
//
// NODES   virtual nodes                                       (50)
// BASES   drays, comma-separated; each node uses one of them  (BASE)
import { base, common, images, pull, thresholds } from "./lib/registry.js";
import { summary } from "./lib/summary.js";
import { Trend } from "k6/metrics";

const nodes = Number(__ENV.NODES || 50);
const bases = (__ENV.BASES || base).split(",");
const pulls = new Trend("node_has_it", true);

export const options = {
  ...common,
  scenarios: { rollout: { executor: "per-vu-iterations", vus: nodes, iterations: 1, maxDuration: "10m" } },
  thresholds: thresholds(),
};

export default function () {
  pulls.add(pull(images[0], bases[__VU % bases.length]));
}

export const handleSummary = summary(`rollout to ${nodes} nodes`);
