// Requests of a container runtime to a registry, counted and checked.
import http from "k6/http";
import { check, fail } from "k6";
import { Counter, Trend } from "k6/metrics";

export const base = (__ENV.BASE || "http://127.0.0.1:5050").replace(/\/$/, "");
export const images = (__ENV.IMAGES || "docker.io/library/alpine:latest").split(",");
const [os, architecture] = (__ENV.PLATFORM || "linux/amd64").split("/");

const bytes = new Counter("pulled_bytes");
const firstByte = new Trend("first_byte", true);
// One counter per source, because k6 shows no tags in its summary.
const bySource = Object.fromEntries(
  ["memory", "disk", "peer", "upstream", "stale", "none"].map((source) => [source, new Counter(`from_${source}`)]),
);

// Thresholds of every scenario. P95_MS bounds the p95 time to the first byte, in ms.
export function thresholds(more = {}) {
  const wanted = { checks: ["rate==1"], ...more };
  if (__ENV.P95_MS) wanted.first_byte = [`p(95)<${__ENV.P95_MS}`];
  return wanted;
}

export const common = { discardResponseBodies: true, summaryTrendStats: ["min", "avg", "med", "p(95)", "p(99)", "max"] };

export const accept = [
  "application/vnd.oci.image.index.v1+json",
  "application/vnd.oci.image.manifest.v1+json",
  "application/vnd.docker.distribution.manifest.list.v2+json",
  "application/vnd.docker.distribution.manifest.v2+json",
].join(", ");

// registry/repository:tag
export function parse(image) {
  const slash = image.indexOf("/");
  const colon = image.lastIndexOf(":");
  return { registry: image.slice(0, slash), repository: image.slice(slash + 1, colon), tag: image.slice(colon + 1) };
}

export function url(image, path, at = base) {
  const { registry, repository } = parse(image);
  return `${at}/v2/${repository}/${path}?ns=${encodeURIComponent(registry)}`;
}

export function resolve(image, at = base) {
  const head = http.head(url(image, `manifests/${parse(image).tag}`, at), { headers: { Accept: accept }, tags: { name: "tag" } });
  check(head, { "tag resolved": (r) => r.status === 200 && Boolean(r.headers["Docker-Content-Digest"]) });
  count(head, 0);
  return head.headers["Docker-Content-Digest"];
}

export function manifest(image, digest, at = base) {
  const response = http.get(url(image, `manifests/${digest}`, at), {
    headers: { Accept: accept },
    responseType: "text",
    tags: { name: "manifest" },
  });
  const right = check(response, {
    "manifest has its digest": (r) => r.status === 200 && r.headers["Docker-Content-Digest"] === digest,
  });
  if (!right) fail(`${image}@${digest}: ${response.status}`);
  count(response, response.body.length);
  return JSON.parse(response.body);
}

// The blobs of an image for the platform, the config first.
export function blobs(image, at = base) {
  let found = manifest(image, resolve(image, at), at);
  if (found.manifests) {
    const entry = found.manifests.find((m) => m.platform.os === os && m.platform.architecture === architecture);
    if (!entry) fail(`${image} has no ${os}/${architecture}`);
    found = manifest(image, entry.digest, at);
  }
  return [found.config, ...found.layers];
}

// Pulls as a runtime does: tag, index, manifest, then all blobs at once. Returns the time in ms.
export function pull(image, at = base) {
  const begun = Date.now();
  const wanted = blobs(image, at);
  const responses = http.batch(wanted.map((blob) => ["GET", url(image, `blobs/${blob.digest}`, at), null, { tags: { name: "blob" } }]));
  responses.forEach((response, nth) => whole(response, wanted[nth].size));
  return Date.now() - begun;
}

export function whole(response, size) {
  const isWhole = check(response, {
    "blob is whole": (r) => r.status === 200 && r.error_code === 0 && Number(r.headers["Content-Length"]) === size,
  });
  count(response, isWhole ? size : 0);
  return isWhole;
}

export function count(response, size) {
  const source = response.headers["X-Dray-Source"] || "none";
  (bySource[source] || bySource.none).add(1);
  bytes.add(size);
  firstByte.add(response.timings.waiting);
}
