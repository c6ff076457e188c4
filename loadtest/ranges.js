// Reads random pieces of layers, as lazy snapshotters do, which start a container before its image is complete
// (stargz, SOCI, nydus), and open-ended ranges, as containerd does when it downloads a layer by several connections.
//
// VUS       readers at a time            (16)
// DURATION  in seconds                   (20)
// PIECE     bytes of a piece             (50000)
import http from "k6/http";
import { check } from "k6";
import { blobs, common, count, images, thresholds, url } from "./lib/registry.js";
import { summary } from "./lib/summary.js";

const piece = Number(__ENV.PIECE || 50000);

export const options = {
  ...common,
  scenarios: {
    ranges: { executor: "constant-vus", vus: Number(__ENV.VUS || 16), duration: `${Number(__ENV.DURATION || 20)}s` },
  },
  thresholds: thresholds(),
};

export function setup() {
  return images.flatMap((image) => blobs(image).map((blob) => ({ image, ...blob }))).filter((blob) => blob.size > 2 * piece);
}

export default function (wanted) {
  const blob = wanted[Math.floor(Math.random() * wanted.length)];
  const isOpen = __ITER % 20 === 0;
  const start = isOpen ? blob.size - piece : Math.floor(Math.random() * (blob.size - piece));
  const end = Math.min(start + piece, blob.size);
  const range = isOpen ? `bytes=${start}-` : `bytes=${start}-${end - 1}`;
  const response = http.get(url(blob.image, `blobs/${blob.digest}`), { headers: { Range: range }, tags: { name: "range" } });
  check(response, {
    "exactly the range": (r) =>
      r.status === 206 && r.error_code === 0 && r.headers["Content-Range"] === `bytes ${start}-${end - 1}/${blob.size}`,
  });
  count(response, end - start);
}

export const handleSummary = summary("ranges");
