// Downloads whole layers, several at a time: the throughput of a dray.
//
// VUS       clients at a time    (16)
// DURATION  in seconds           (30)
import http from "k6/http";
import { blobs, common, images, thresholds, url, whole } from "./lib/registry.js";
import { summary } from "./lib/summary.js";

export const options = {
  ...common,
  scenarios: {
    blobs: { executor: "constant-vus", vus: Number(__ENV.VUS || 16), duration: `${Number(__ENV.DURATION || 30)}s` },
  },
  thresholds: thresholds(),
};

export function setup() {
  return images.flatMap((image) => blobs(image).map((blob) => ({ image, ...blob })));
}

export default function (wanted) {
  const blob = wanted[Math.floor(Math.random() * wanted.length)];
  whole(http.get(url(blob.image, `blobs/${blob.digest}`), { tags: { name: "blob" } }), blob.size);
}

export const handleSummary = summary("blobs");
