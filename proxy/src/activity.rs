//! Recent activity for the status: the last responses, the most requested images, bytes by source.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, VecDeque};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// Bounded, and in memory only: a restart clears it.
#[derive(Default)]
pub struct Activity(Mutex<ImageActivity>);

#[derive(Default)]
struct ImageActivity {
    recent: VecDeque<ServedContent>,
    images: HashMap<String, Demand>,
    sources: BTreeMap<Cow<'static, str>, Traffic>,
}

/// One response to a request for content, including errors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServedContent {
    /// `X-Request-Id`, as in the access log.
    pub id: String,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// `manifest`, `blob`, `tags` or `referrers`
    pub route: Cow<'static, str>,
    /// `registry/repository`
    pub image: String,
    /// The tag or digest.
    pub reference: String,
    pub status: u16,
    pub source: Cow<'static, str>,
    pub bytes: u64,
    /// None: no byte of a body was sent.
    pub first_byte_ms: Option<f64>,
    pub total_ms: f64,
}

/// How often an image was requested. If the table is full, all counts are halved.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Demand {
    pub image: String,
    pub requests: u64,
    pub bytes: u64,
}

/// Responses from one source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    pub requests: u64,
    pub bytes: u64,
}

const MAX_RECENT: usize = 100;
const MAX_IMAGES: usize = 2_000;
const MAX_LISTED_IMAGES: usize = 20;

impl Activity {
    pub fn add(&self, response: ServedContent) {
        let mut activity = self.0.lock();
        let traffic = activity.sources.entry(response.source.clone()).or_default();
        traffic.requests += 1;
        traffic.bytes += response.bytes;
        if response.status < 400 {
            activity.count_image(&response.image, response.bytes);
        }
        if activity.recent.len() == MAX_RECENT {
            activity.recent.pop_back();
        }
        activity.recent.push_front(response);
    }

    /// The last responses, newest first.
    pub fn recent(&self) -> Vec<ServedContent> {
        self.0.lock().recent.iter().cloned().collect()
    }

    /// The most requested images.
    pub fn images(&self) -> Vec<Demand> {
        let mut images: Vec<Demand> = self.0.lock().images.values().cloned().collect();
        images.sort_by(|a, b| (b.requests, b.bytes, &a.image).cmp(&(a.requests, a.bytes, &b.image)));
        images.truncate(MAX_LISTED_IMAGES);
        images
    }

    /// Since the process started.
    pub fn sources(&self) -> BTreeMap<Cow<'static, str>, Traffic> {
        self.0.lock().sources.clone()
    }
}

impl ImageActivity {
    fn count_image(&mut self, image: &str, bytes: u64) {
        while self.images.len() >= MAX_IMAGES && !self.images.contains_key(image) {
            self.images.retain(|_, demand| {
                demand.requests /= 2;
                demand.bytes /= 2;
                demand.requests > 0
            });
        }
        match self.images.get_mut(image) {
            Some(demand) => {
                demand.requests += 1;
                demand.bytes += bytes;
            }
            None => {
                let image = image.to_owned();
                self.images.insert(image.clone(), Demand { image, requests: 1, bytes });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(image: &str, source: &str, bytes: u64) -> ServedContent {
        ServedContent {
            id: "1".into(),
            at_ms: 0,
            route: "blob".into(),
            image: image.into(),
            reference: "1".into(),
            status: 200,
            source: source.to_owned().into(),
            bytes,
            first_byte_ms: None,
            total_ms: 1.0,
        }
    }

    #[test]
    fn recent_top_images_and_totals_are_kept() {
        let activity = Activity::default();
        (0..10_030).for_each(|nth| activity.add(response(&format!("a/{nth}"), "disk", 1)));
        (0..50).for_each(|_| activity.add(response("a/hot", "memory", 2)));
        activity.add(ServedContent { status: 404, ..response("a/missing", "none", 0) });
        assert_eq!((activity.recent().len(), activity.recent()[0].image.as_str()), (MAX_RECENT, "a/missing"));
        assert_eq!(activity.images()[0], Demand { image: "a/hot".into(), requests: 50, bytes: 100 });
        assert!(activity.images().len() == MAX_LISTED_IMAGES && activity.0.lock().images.len() <= MAX_IMAGES);
        assert_eq!(activity.sources()["disk"], Traffic { requests: 10_030, bytes: 10_030 });
    }
}
