//! Tokens of Google's metadata server, for the service account of the machine or pod.

use std::sync::LazyLock;
use std::time::Duration;

use serde::Deserialize;

use super::{CredentialsError, Found};
use crate::secret::Secret;
use crate::source::root_cause;

#[derive(Deserialize)]
struct Token {
    access_token: String,
    expires_in: u64,
}

/// As Google's own libraries call it.
const HOST_VARIABLE: &str = "GCE_METADATA_HOST";
const HOST: &str = "metadata.google.internal";
const PATH: &str = "/computeMetadata/v1/instance/service-accounts/default/token";

/// The user name that takes an access token for a password.
const USERNAME: &str = "oauth2accesstoken";

const PATIENCE: Duration = Duration::from_secs(5);

static CLIENT: LazyLock<reqwest::Result<reqwest::Client>> = LazyLock::new(|| {
    reqwest::Client::builder().no_proxy().timeout(PATIENCE).redirect(reqwest::redirect::Policy::none()).build()
});

/// A token, and half of its life: it is renewed well before its end.
pub(super) async fn ask() -> Result<Found, CredentialsError> {
    let failed = |why: String| CredentialsError::Cloud("Google's metadata server", why);
    let host = std::env::var(HOST_VARIABLE).unwrap_or_else(|_| HOST.to_owned());
    let client = CLIENT.as_ref().map_err(|e| failed(root_cause(e)))?;
    let asked = client.get(format!("http://{host}{PATH}")).header("Metadata-Flavor", "Google").send().await;
    let response = asked.and_then(reqwest::Response::error_for_status).map_err(|e| failed(root_cause(&e)))?;
    let bytes = response.bytes().await.map_err(|e| failed(root_cause(&e)))?;
    let token: Token = serde_json::from_slice(&bytes).map_err(|_| failed("its answer is no token".to_owned()))?;
    let secret = Secret::Password { username: USERNAME.to_owned(), password: token.access_token };
    Ok(Found { secret: Some(secret), life: Duration::from_secs(token.expires_in) / 2 })
}

/// Whether a host is one of Google's registries: others must not be sent a token.
pub(super) fn is_registry(authority: &str) -> bool {
    authority == "gcr.io" || authority.ends_with(".gcr.io") || authority.ends_with(".pkg.dev")
}
