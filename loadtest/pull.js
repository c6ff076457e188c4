// Pulls images as a container runtime does: HEAD of the tag, index, platform manifest, config and
// layers by digest. Fails if any answer is wrong; if P95_MS is set, also if it is slow.
//
//   k6 run -e BASE=http://127.0.0.1:5050 -e IMAGES=docker.io/library/alpine:latest loadtest/pull.js
//
// BASE        where dray listens                         (http://127.0.0.1:5050)
// IMAGES      comma-separated, with their registry       (docker.io/library/alpine:latest)
// VUS         pulls at the same time                     (10)
// ITERATIONS  pulls in all                               (50)
// PLATFORM    os/architecture                            (linux/amd64)
// P95_MS      bound for the time to the first byte of 95 % of the requests, in ms (none)
import http from "k6/http";
import { check, fail } from "k6";
import { Counter } from "k6/metrics";

const base = __ENV.BASE || "http://127.0.0.1:5050";
const images = (__ENV.IMAGES || "docker.io/library/alpine:latest").split(",");
const [os, architecture] = (__ENV.PLATFORM || "linux/amd64").split("/");
const sources = new Counter("dray_sources");
const bytes = new Counter("pulled_bytes");

const thresholds = { checks: ["rate==1"], http_req_failed: ["rate==0"] };
if (__ENV.P95_MS) thresholds.http_req_waiting = [`p(95)<${__ENV.P95_MS}`];

export const options = {
  scenarios: {
    pulls: {
      executor: "shared-iterations",
      vus: Number(__ENV.VUS || 10),
      iterations: Number(__ENV.ITERATIONS || 50),
      maxDuration: "10m",
    },
  },
  thresholds,
  discardResponseBodies: true,
  summaryTrendStats: ["avg", "med", "p(95)", "p(99)", "max"],
};

const accept = [
  "application/vnd.oci.image.index.v1+json",
  "application/vnd.oci.image.manifest.v1+json",
  "application/vnd.docker.distribution.manifest.list.v2+json",
  "application/vnd.docker.distribution.manifest.v2+json",
].join(", ");

export default function () {
  const image = images[__ITER % images.length];
  const slash = image.indexOf("/");
  const colon = image.lastIndexOf(":");
  const registry = image.slice(0, slash);
  const repository = image.slice(slash + 1, colon);
  const tag = image.slice(colon + 1);
  const url = (path) => `${base}/v2/${repository}/${path}?ns=${encodeURIComponent(registry)}`;

  const head = http.head(url(`manifests/${tag}`), { headers: { Accept: accept }, tags: { name: "tag" } });
  check(head, { "tag resolved": (r) => r.status === 200 && Boolean(r.headers["Docker-Content-Digest"]) });
  let manifest = getManifest(url, head.headers["Docker-Content-Digest"]);
  if (manifest.manifests) {
    const entry = manifest.manifests.find((m) => m.platform.os === os && m.platform.architecture === architecture);
    if (!entry) fail(`${image} has no ${os}/${architecture}`);
    manifest = getManifest(url, entry.digest);
  }
  const blobs = [manifest.config, ...manifest.layers];
  const answers = http.batch(blobs.map((blob) => ["GET", url(`blobs/${blob.digest}`), null, { tags: { name: "blob" } }]));
  answers.forEach((answer, nth) => {
    const size = blobs[nth].size;
    check(answer, {
      "blob is whole": (r) => r.status === 200 && r.error_code === 0 && Number(r.headers["Content-Length"]) === size,
    });
    count(answer, size);
  });
}

function getManifest(url, digest) {
  const answer = http.get(url(`manifests/${digest}`), {
    headers: { Accept: accept },
    responseType: "text",
    tags: { name: "manifest" },
  });
  const right = check(answer, {
    "manifest has its digest": (r) => r.status === 200 && r.headers["Docker-Content-Digest"] === digest,
  });
  if (!right) fail(`${digest}: ${answer.status}`);
  count(answer, answer.body.length);
  return JSON.parse(answer.body);
}

function count(answer, size) {
  sources.add(1, { source: answer.headers["X-Dray-Source"] || "none" });
  bytes.add(size);
}
