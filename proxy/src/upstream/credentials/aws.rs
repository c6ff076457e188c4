//! Authorization tokens of Amazon's ECR, for the identity of the pod or machine.
//!
//! The sources of Amazon's libraries are tried in order: keys of the environment or of a profile, a web identity
//! (IRSA), Pod Identity or ECS, the instance's role. The first configured one is used; if it fails, its error is the
//! result. Only the keys of a profile are supported: if `AWS_PROFILE` selects one with a role, this is an error.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{Request, Response};
use reqsign_aws_v4::{
    AssumeRoleWithWebIdentityCredentialProvider, Credential, ECSCredentialProvider, EnvCredentialProvider,
    IMDSv2CredentialProvider, ProfileCredentialProvider, RequestSigner,
};
use reqsign_core::{Context, FileRead, HttpSend, ProvideCredentialDyn, SignRequest, StaticEnv};
use reqwest::{Client, RequestBuilder};
use serde::Deserialize;

use super::cloud::{read_bounded, read_json, truncated};
use super::{CredentialsError, FoundCredentials, read_file};
use crate::blocking::on_thread;
use crate::oci::Digest;
use crate::secret::Secret;
use crate::source::root_cause;

/// Amazon's registries are `<account>.dkr.ecr.<region>` with one of these suffixes.
const SUFFIXES: [&str; 4] = [".amazonaws.com", ".amazonaws.com.cn", ".on.aws", ".on.amazonwebservices.com.cn"];

/// The operation of ECR's API, version 2015-09-21: <https://docs.aws.amazon.com/AmazonECR/latest/APIReference/>.
const TARGET: &str = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken";

/// The response to `GetAuthorizationToken`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EcrTokens {
    #[serde(default)]
    authorization_data: Vec<EcrToken>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EcrToken {
    /// User name and password, as Basic authentication encodes them.
    authorization_token: String,
    /// Seconds since 1970.
    expires_at: f64,
}

/// A token, cached for half of its lifetime so that it is renewed well before it expires.
pub(super) async fn fetch(client: &Client, authority: &str) -> Result<FoundCredentials, CredentialsError> {
    let failed = |why: String| CredentialsError::Cloud("Amazon's ECR", why);
    let environment = Environment::read();
    let EcrToken { authorization_token, expires_at } =
        environment.token(client, region(authority)).await.map_err(failed)?;
    let secret = Secret::from_basic(&format!("Basic {authorization_token}"));
    let secret = secret.ok_or_else(|| failed("the token is not a user name and password".to_owned()))?;
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let ends = Duration::try_from_secs_f64(expires_at).unwrap_or_default();
    Ok(FoundCredentials { secret: Some(secret), life: ends.saturating_sub(now) / 2 })
}

/// The variables of the process.
#[derive(Clone, Debug)]
struct Environment(HashMap<String, String>);

impl Environment {
    fn read() -> Self {
        let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        Self::of(std::env::vars_os().filter_map(text))
    }

    /// An empty variable counts as unset: manifests often contain some.
    fn of(variables: impl Iterator<Item = (String, String)>) -> Self {
        Self(variables.filter(|(_, value)| !value.trim().is_empty()).collect())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The region of a registry, else that of the process.
    fn region<'a>(&'a self, of_registry: Option<&'a str>) -> Result<&'a str, String> {
        let region = of_registry.or_else(|| self.get("AWS_REGION")).or_else(|| self.get("AWS_DEFAULT_REGION"));
        region.ok_or_else(|| "the registry's name contains no region: set AWS_REGION".to_owned())
    }

    /// The endpoint of a service, if it is overridden (service-specific endpoints of Amazon's SDKs).
    fn endpoint(&self, service: &str) -> Option<&str> {
        let endpoint = self.get(&format!("AWS_ENDPOINT_URL_{service}")).or_else(|| self.get("AWS_ENDPOINT_URL"));
        endpoint.map(|url| url.trim_end_matches('/'))
    }

    /// The API of ECR in a region: <https://docs.aws.amazon.com/general/latest/gr/ecr.html>.
    fn api(&self, region: &str) -> String {
        if let Some(endpoint) = self.endpoint("ECR") {
            return endpoint.to_owned();
        }
        let is_set = |name| self.get(name) == Some("true");
        let is_china = region.starts_with("cn-");
        let (plain, suffix) = match (is_set("AWS_USE_DUALSTACK_ENDPOINT"), is_china) {
            (true, true) => ("ecr", "api.amazonwebservices.com.cn"),
            (true, false) => ("ecr", "api.aws"),
            (false, true) => ("api.ecr", "amazonaws.com.cn"),
            (false, false) => ("api.ecr", "amazonaws.com"),
        };
        let host = if is_set("AWS_USE_FIPS_ENDPOINT") { "ecr-fips" } else { plain };
        format!("https://{host}.{region}.{suffix}")
    }

    async fn token(self, client: &Client, of_registry: Option<&str>) -> Result<EcrToken, String> {
        let region = self.region(of_registry)?.to_owned();
        let (api, sts) = (self.api(&region), self.endpoint("STS").map(str::to_owned));
        let home_dir = self.get("HOME").map(Into::into);
        let context = Context::new()
            .with_file_read(ProfileFiles)
            .with_http_send(SignerHttp { client: client.clone(), sts })
            .with_env(StaticEnv { home_dir, envs: self.0 });
        let credential = credential(&context, &region).await?;
        let request = signed_request(&context, &credential, &api, &region).await?;
        let request = RequestBuilder::from_parts(client.clone(), request);
        let tokens: EcrTokens = read_json(request, "GetAuthorizationToken", "").await?;
        tokens.authorization_data.into_iter().next().ok_or_else(|| "GetAuthorizationToken: no token".to_owned())
    }
}

/// The first identity that is configured.
async fn credential(context: &Context, region: &str) -> Result<Credential, String> {
    let web_identity =
        AssumeRoleWithWebIdentityCredentialProvider::new().with_region(region.to_owned()).with_regional_sts_endpoint();
    let keys: [&dyn ProvideCredentialDyn<Credential = Credential>; 2] =
        [&EnvCredentialProvider::new(), &ProfileCredentialProvider::default()];
    for source in keys {
        if let Some(credential) = source.provide_credential_dyn(context).await.map_err(|error| explain(&error))? {
            return Ok(credential);
        }
    }
    // Without this error, another identity than the selected one would be used.
    if let Some(profile) = context.env_var("AWS_PROFILE") {
        return Err(format!("AWS_PROFILE: the profile {profile} has no aws_access_key_id and aws_secret_access_key"));
    }
    let sources: [&dyn ProvideCredentialDyn<Credential = Credential>; 3] =
        [&web_identity, &ECSCredentialProvider::new(), &IMDSv2CredentialProvider::new()];
    for source in sources {
        if let Some(credential) = source.provide_credential_dyn(context).await.map_err(|error| explain(&error))? {
            return Ok(credential);
        }
    }
    Err("no identity is configured: no keys, web identity, container credentials or instance role".to_owned())
}

/// `GetAuthorizationToken`, signed by AWS Signature Version 4.
async fn signed_request(
    context: &Context,
    credential: &Credential,
    api: &str,
    region: &str,
) -> Result<reqwest::Request, String> {
    let body = Bytes::from_static(b"{}");
    let request = Request::post(format!("{api}/"))
        .header(CONTENT_TYPE, "application/x-amz-json-1.1")
        .header("x-amz-target", TARGET)
        .header("x-amz-content-sha256", Digest::of(&body).hex())
        .body(())
        .map_err(|error| format!("{api}: {error}"))?;
    let (mut parts, ()) = request.into_parts();
    let signer = RequestSigner::new("ecr", region);
    signer.sign_request(context, &mut parts, Some(credential), None).await.map_err(|error| explain(&error))?;
    reqwest::Request::try_from(Request::from_parts(parts, body)).map_err(|error| error.without_url().to_string())
}

/// The library's error names the attempt, its root cause the reason.
fn explain(error: &reqsign_core::Error) -> String {
    let (attempt, cause) = (error.to_string(), root_cause(error));
    truncated(&if cause == attempt { attempt } else { format!("{attempt}: {cause}") })
}

/// Reads files for the library, on a thread that may block.
#[derive(Debug)]
struct ProfileFiles;

impl FileRead for ProfileFiles {
    async fn file_read(&self, path: &str) -> reqsign_core::Result<Vec<u8>> {
        let path = PathBuf::from(path);
        let text = on_thread(move || read_file(&path)).await;
        text.map(String::into_bytes).map_err(|error| reqsign_core::Error::config_invalid(error.to_string()))
    }
}

/// Sends the library's requests.
#[derive(Debug)]
struct SignerHttp {
    client: Client,
    /// The endpoint of the Security Token Service, if it is overridden.
    sts: Option<String>,
}

impl HttpSend for SignerHttp {
    async fn http_send(&self, mut request: Request<Bytes>) -> reqsign_core::Result<Response<Bytes>> {
        let failed = |cause: String| reqsign_core::Error::unexpected(cause);
        let is_sts = request.uri().host().is_some_and(|host| host.starts_with("sts."));
        if let Some(sts) = self.sts.as_ref().filter(|_| is_sts) {
            *request.uri_mut() = format!("{sts}/").parse().map_err(|error| failed(format!("{sts}: {error}")))?;
        }
        let failed = |error: reqwest::Error| reqsign_core::Error::unexpected(root_cause(&error.without_url()));
        let request = reqwest::Request::try_from(request).map_err(failed)?;
        let response = self.client.execute(request).await.map_err(failed)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let mut whole = Response::new(read_bounded(response).await.map_err(failed)?);
        *whole.status_mut() = status;
        *whole.headers_mut() = headers;
        Ok(whole)
    }
}

/// Whether a host is one of Amazon's private registries. Any other host gets a token only if it is a configured
/// upstream.
pub(super) fn is_registry(authority: &str) -> bool {
    region(authority).is_some()
}

/// The region of `123456789012.dkr.ecr.eu-west-1.amazonaws.com`, also with `dkr-ecr` or `-fips`.
fn region(authority: &str) -> Option<&str> {
    let (account, rest) = authority.split_once('.')?;
    let is_account = account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit());
    let rest = rest.strip_prefix("dkr.ecr").or_else(|| rest.strip_prefix("dkr-ecr"))?;
    let rest = rest.strip_prefix("-fips").unwrap_or(rest).strip_prefix('.')?;
    let region = SUFFIXES.iter().find_map(|suffix| rest.strip_suffix(suffix))?;
    let is_region = !region.is_empty() && region.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    (is_account && is_region).then_some(region)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registry_name_contains_its_region() {
        for (host, region_of) in [
            ("123456789012.dkr.ecr.eu-west-1.amazonaws.com", "eu-west-1"),
            ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", "cn-north-1"),
            ("123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
            ("123456789012.dkr-ecr.eu-west-1.on.aws", "eu-west-1"),
        ] {
            assert_eq!(region(host), Some(region_of), "{host}");
        }
        for other in [
            "12345678901.dkr.ecr.eu-west-1.amazonaws.com",
            "123456789012.dkr.ecr.eu-west-1.amazonaws.com.evil.example",
            "123456789012.dkr.ecr.evil.example.amazonaws.com",
            "123456789012.dkr.ecr..amazonaws.com",
            "public.ecr.aws",
            "dkr.ecr.eu-west-1.amazonaws.com",
        ] {
            assert!(!is_registry(other), "{other}");
        }
    }
    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment::of(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
    }

    #[test]
    fn ecr_endpoint_is_chosen_by_region() {
        for (variables, region, api) in [
            (&[][..], "eu-west-1", "https://api.ecr.eu-west-1.amazonaws.com"),
            (&[], "cn-north-1", "https://api.ecr.cn-north-1.amazonaws.com.cn"),
            (&[("AWS_USE_FIPS_ENDPOINT", "true")], "us-east-1", "https://ecr-fips.us-east-1.amazonaws.com"),
            (&[("AWS_USE_DUALSTACK_ENDPOINT", "true")], "eu-west-1", "https://ecr.eu-west-1.api.aws"),
            (&[("AWS_ENDPOINT_URL", "")], "eu-west-1", "https://api.ecr.eu-west-1.amazonaws.com"),
            (&[("AWS_ENDPOINT_URL", "http://a:1/")], "us-east-1", "http://a:1"),
            (&[("AWS_ENDPOINT_URL", "http://a:1"), ("AWS_ENDPOINT_URL_ECR", "http://b:2")], "us-east-1", "http://b:2"),
        ] {
            assert_eq!(environment(variables).api(region), api, "{variables:?}");
        }
    }

    #[test]
    fn registry_region_precedes_process_region() {
        let process = environment(&[("AWS_REGION", "eu-west-1"), ("AWS_DEFAULT_REGION", "eu-west-2")]);
        assert_eq!(process.region(Some("us-east-1")), Ok("us-east-1"));
        assert_eq!(process.region(None), Ok("eu-west-1"));
        assert_eq!(environment(&[("AWS_DEFAULT_REGION", "eu-west-2")]).region(None), Ok("eu-west-2"));
        assert!(environment(&[("AWS_REGION", "")]).region(None).unwrap_err().contains("AWS_REGION"));
    }
}
