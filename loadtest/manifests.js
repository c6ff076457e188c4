// Resolves tags, as a cluster does with imagePullPolicy Always: at a steady rate, then in a burst.
//
// RATE      requests a second, steady          (200)
// BURST     requests a second in the burst     (2000)
// DURATION  of each, in seconds                (20)
import { common, images, manifest, resolve, thresholds } from "./lib/registry.js";
import { summary } from "./lib/summary.js";

const seconds = Number(__ENV.DURATION || 20);
const scenario = (rate, start) => ({
  executor: "constant-arrival-rate",
  rate,
  timeUnit: "1s",
  duration: `${seconds}s`,
  startTime: `${start}s`,
  preAllocatedVUs: Math.min(500, Math.ceil(rate / 10)),
  maxVUs: 1000,
});

export const options = {
  ...common,
  scenarios: { steady: scenario(Number(__ENV.RATE || 200), 0), burst: scenario(Number(__ENV.BURST || 2000), seconds) },
  thresholds: thresholds(),
};

export default function () {
  const image = images[Math.floor(Math.random() * images.length)];
  const digest = resolve(image);
  // A runtime without the manifest requests it by digest.
  if (__ITER % 10 === 0) manifest(image, digest);
}

export const handleSummary = summary("manifests, steady and in a burst");
