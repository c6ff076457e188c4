// More images than the cache holds, some of them pulled often: what stays cached, and what a pull takes.
//
// VUS       clients at a time                    (8)
// DURATION  in seconds                           (60)
// HOT       images that get half of all pulls    (2)
import { common, images, pull, thresholds } from "./lib/registry.js";
import { summary } from "./lib/summary.js";
import { Trend } from "k6/metrics";

const hot = Math.min(images.length, Number(__ENV.HOT || 2));
const [hotPulls, coldPulls] = [new Trend("pull_hot", true), new Trend("pull_cold", true)];

export const options = {
  ...common,
  scenarios: {
    churn: { executor: "constant-vus", vus: Number(__ENV.VUS || 8), duration: `${Number(__ENV.DURATION || 60)}s` },
  },
  thresholds: thresholds(),
};

export default function () {
  const isHot = __ITER % 2 === 0;
  const image = isHot
    ? images[Math.floor(Math.random() * hot)]
    : images[Math.floor(Math.random() * images.length)];
  (isHot ? hotPulls : coldPulls).add(pull(image));
}

export const handleSummary = summary("churn");
