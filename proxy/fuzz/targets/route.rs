//! No path, query or host may cause a panic, and what parses is well-formed.
#![no_main]

use dray_fuzz::oci::Registry;
use dray_fuzz::oci::route::{Names, Route, parse};
use libfuzzer_sys::fuzz_target;

struct Fixed;

impl Names for Fixed {
    fn alias(&self, component: &str) -> Option<Registry> {
        (component == "corp").then(|| "reg.corp:5000".parse().ok()).flatten()
    }

    fn host_is_registry(&self, host: &Registry) -> bool {
        host.port().is_none()
    }

    fn only_registry(&self) -> Option<Registry> {
        None
    }
}

fuzz_target!(|input: (&str, Option<&str>, Option<&str>)| {
    let (path, query, host) = input;
    if let Ok(Route::Content { registry, repository, .. }) = parse(path, query, host, &Fixed) {
        assert_eq!(registry.as_str().parse(), Ok(registry.clone()));
        assert!(!repository.as_str().split('/').any(|part| part.is_empty() || part == "." || part == ".."));
    }
});
