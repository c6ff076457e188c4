// Pulls images as a container runtime does: HEAD of the tag, index, platform manifest, config and layers by digest.
// Fails if any response is wrong, and if P95_MS is set, also if it is slow.
//
//   k6 run -e BASE=http://127.0.0.1:5050 -e IMAGES=docker.io/library/alpine:latest loadtest/pull.js
//
// VUS         pulls at the same time   (10)
// ITERATIONS  pulls in all             (50)
// Variables of all scripts: README.md.
import { common, images, pull, thresholds } from "./lib/registry.js";
import { summary } from "./lib/summary.js";
import { Trend } from "k6/metrics";

const pulls = new Trend("pull", true);
const iterations = Number(__ENV.ITERATIONS || 50);

export const options = {
  ...common,
  scenarios: {
    pulls: {
      executor: "shared-iterations",
      vus: Math.min(iterations, Number(__ENV.VUS || 10)),
      iterations,
      maxDuration: "10m",
    },
  },
  thresholds: thresholds(),
};

export default function () {
  pulls.add(pull(images[__ITER % images.length]));
}

export const handleSummary = summary("pulls");
