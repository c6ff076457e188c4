//! Keys of earlier drafts, so that a refused file says what to write instead.

/// Old key, new key. The old name occurs nowhere else as a key that toml would not know.
const RENAMED: [(&str, &str); 13] = [
    ("unlisted", "access.unlisted_registries"),
    ("clients", "access.allowed_cidrs"),
    ("logins_file", "access.users_file"),
    ("requests_at_once", "access.max_concurrent_requests"),
    ("requests_per_second", "access.max_requests_per_second"),
    ("key_file", "access.token_key_file"),
    ("access", "registry.authorization, \"shared\" or \"passthrough\""),
    ("stale_for", "registry.stale_if_error"),
    ("abandoned", "registry.on_client_abort, \"stop\" or \"finish\""),
    ("far_peers", "registry.cross_zone_peers"),
    ("keep_free", "cache.min_free"),
    ("scrub", "cache.scrub_rate"),
    ("guard", "[egress] allow_cidrs"),
];

/// What to write instead of the unknown key that an error of toml names; empty if nothing replaces it.
pub(super) fn hint(error: &str) -> String {
    let unknown = error.split_once("unknown field `").and_then(|(_, rest)| rest.split_once('`'));
    let new = unknown.and_then(|(key, _)| RENAMED.iter().find(|(old, _)| *old == key));
    new.map_or_else(String::new, |(old, new)| format!("`{old}` is now {new}\n"))
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn renamed_key_is_refused_with_its_new_name() {
        for (text, new) in [
            ("[access]\nunlisted = \"deny\"", "access.unlisted_registries"),
            ("[access]\nkey_file = \"k\"", "access.token_key_file"),
            ("[[registry]]\nmatch = \"*\"\nstale_for = \"1d\"", "registry.stale_if_error"),
            ("[[registry]]\nmatch = \"*\"\naccess = \"client\"", "passthrough"),
            ("[guard]\nallow = []", "[egress] allow_cidrs"),
            ("[cache]\nscrub = \"0B\"", "cache.scrub_rate"),
        ] {
            let error = Config::parse(text, "x.toml").unwrap_err().to_string();
            assert!(
                error.contains(new) && error.contains("line 2") | error.contains("line 3") | error.contains("line 1"),
                "{error}"
            );
        }
        assert!(!Config::parse("[access]\nclientz = []", "x.toml").unwrap_err().to_string().contains("is now"));
    }
}
