//! Tokens from Google's metadata server, for the service account of the machine or pod.

use std::time::Duration;

use reqwest::Client;
use serde::Deserialize;

use super::cloud::read_json;
use super::{CredentialsError, FoundCredentials};
use crate::secret::Secret;

#[derive(Deserialize)]
struct MetadataToken {
    access_token: String,
    expires_in: u64,
}

/// The variable of Google's libraries.
const HOST_VARIABLE: &str = "GCE_METADATA_HOST";
const HOST: &str = "metadata.google.internal";
const PATH: &str = "/computeMetadata/v1/instance/service-accounts/default/token";

/// The user name for an access token as the password.
const USERNAME: &str = "oauth2accesstoken";

/// A token, cached for half of its lifetime so that it is renewed well before it expires.
pub(super) async fn fetch(client: &Client) -> Result<FoundCredentials, CredentialsError> {
    let failed = |why: String| CredentialsError::Cloud("Google", why);
    let host = std::env::var(HOST_VARIABLE).unwrap_or_else(|_| HOST.to_owned());
    let request = client.get(format!("http://{host}{PATH}")).header("Metadata-Flavor", "Google");
    let token: MetadataToken = read_json(request, "the metadata server", "").await.map_err(failed)?;
    let secret = Secret::Password { username: USERNAME.to_owned(), password: token.access_token };
    Ok(FoundCredentials { secret: Some(secret), life: Duration::from_secs(token.expires_in) / 2 })
}

/// Whether a host is one of Google's registries. Any other host gets a token only if it is a configured upstream.
pub(super) fn is_registry(authority: &str) -> bool {
    authority == "gcr.io" || authority.ends_with(".gcr.io") || authority.ends_with(".pkg.dev")
}
