//! Tokens for Azure's registries: an access token from Microsoft Entra, exchanged at the registry.
//!
//! A pod with workload identity has a token file of the cluster; a machine uses the metadata service.
//! `/oauth2/exchange` of the registry turns the access token into a refresh token, which is used as a password.

use std::time::Duration;

use reqwest::Client;
use serde::Deserialize;
use url::form_urlencoded::Serializer;

use super::cloud::read_json;
use super::{CredentialsError, FoundCredentials, read_file};
use crate::blocking::on_thread;
use crate::secret::Secret;

/// The resource of the token.
const AUDIENCE: &str = "https://containerregistry.azure.net";

const METADATA_URL: &str = "http://169.254.169.254";
/// The variable of Microsoft's libraries.
const METADATA_VARIABLE: &str = "AZURE_POD_IDENTITY_AUTHORITY_HOST";

/// The user whose password is a refresh token.
const USERNAME: &str = "00000000-0000-0000-0000-000000000000";

/// Refresh tokens are valid for three hours, which the response does not state. Longer: pulls may use an expired one.
/// Shorter: more exchanges.
const REFRESH_TOKEN_TTL: Duration = Duration::from_secs(90 * 60);

#[derive(Deserialize)]
struct AccessToken {
    access_token: String,
}

#[derive(Deserialize)]
struct Refresh {
    refresh_token: String,
}

/// A registry's refresh token; `base` is the registry's `https://host`.
pub(super) async fn fetch(client: &Client, base: &str, authority: &str) -> Result<FoundCredentials, CredentialsError> {
    let failed = |why: String| CredentialsError::Cloud("Azure", why);
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let (request, sent) =
        match (variable("AZURE_FEDERATED_TOKEN_FILE"), variable("AZURE_TENANT_ID"), variable("AZURE_CLIENT_ID")) {
            (Some(file), Some(tenant), Some(id)) => {
                let host =
                    variable("AZURE_AUTHORITY_HOST").unwrap_or_else(|| "https://login.microsoftonline.com".into());
                let read = on_thread(move || read_file(file.as_ref())).await?;
                let (assertion, scope) = (read, format!("{AUDIENCE}/.default"));
                let form = [
                    ("grant_type", "client_credentials"),
                    ("client_id", &id),
                    ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
                    ("client_assertion", assertion.trim()),
                    ("scope", &scope),
                ];
                let request =
                    post(client, &format!("{}/{tenant}/oauth2/v2.0/token", host.trim_end_matches('/')), &form);
                (request, assertion.trim().to_owned())
            }
            (_, _, id) => {
                let host = variable(METADATA_VARIABLE).unwrap_or_else(|| METADATA_URL.to_owned());
                let mut query = Serializer::new(String::new());
                query.append_pair("api-version", "2018-02-01").append_pair("resource", AUDIENCE);
                // Selects one of the machine's identities.
                query.extend_pairs(id.iter().map(|id| ("client_id", id)));
                let url = format!("{}/metadata/identity/oauth2/token?{}", host.trim_end_matches('/'), query.finish());
                (client.get(url).header("Metadata", "true"), String::new())
            }
        };
    let access: AccessToken = read_json(request, "Microsoft Entra", &sent).await.map_err(failed)?;
    let exchange = [("grant_type", "access_token"), ("service", authority), ("access_token", &access.access_token)];
    let request = post(client, &format!("{base}/oauth2/exchange"), &exchange);
    let refresh: Refresh =
        read_json(request, "the registry's /oauth2/exchange", &access.access_token).await.map_err(failed)?;
    let secret = Secret::Password { username: USERNAME.to_owned(), password: refresh.refresh_token };
    Ok(FoundCredentials { secret: Some(secret), life: REFRESH_TOKEN_TTL })
}

fn post(client: &Client, url: &str, form: &[(&str, &str)]) -> reqwest::RequestBuilder {
    let body = Serializer::new(String::new()).extend_pairs(form).finish();
    client.post(url).header(http::header::CONTENT_TYPE, "application/x-www-form-urlencoded").body(body)
}

/// Whether a host is one of Azure's registries. Any other host gets a token only if it is a configured upstream.
pub(super) fn is_registry(authority: &str) -> bool {
    [".azurecr.io", ".azurecr.cn", ".azurecr.us"].iter().any(|suffix| authority.ends_with(suffix))
}
