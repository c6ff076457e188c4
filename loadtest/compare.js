// Two registries with the same image, such as an old one and its successor: which one is faster, in alternating pulls.
//
// BASE_A, BASE_B    registries, or drays with one rule each         (BASE)
// IMAGE_A, IMAGE_B  the image on each, with its registry            (the first of IMAGES)
// ITERATIONS        pulls of each                                   (20)
import { base, common, images, pull, thresholds } from "./lib/registry.js";
import { summary } from "./lib/summary.js";
import { Trend } from "k6/metrics";

const sides = ["A", "B"].map((side) => ({
  at: (__ENV[`BASE_${side}`] || base).replace(/\/$/, ""),
  image: __ENV[`IMAGE_${side}`] || images[0],
  pulls: new Trend(`pull_${side.toLowerCase()}`, true),
}));

export const options = {
  ...common,
  scenarios: { compare: { executor: "shared-iterations", vus: 1, iterations: Number(__ENV.ITERATIONS || 20), maxDuration: "30m" } },
  thresholds: thresholds(),
};

export default function () {
  // The order alternates, because the second pull runs on a warmer machine.
  const order = __ITER % 2 === 0 ? sides : [...sides].reverse();
  order.forEach(({ at, image, pulls }) => pulls.add(pull(image, at)));
}

export const handleSummary = (data) => {
  const [a, b] = ["pull_a", "pull_b"].map((name) => data.metrics[name]?.values.med);
  const files = summary("two registries")(data);
  if (a && b) files.stdout += `  b takes ${(b / a).toFixed(2)} x as long as a (medians)\n`;
  return files;
};
