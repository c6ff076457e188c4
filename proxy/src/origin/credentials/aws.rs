//! Authorization tokens of Amazon's ECR, for whatever the machine or pod is: by web identity, Pod Identity, the
//! instance's role, or what its environment says, as Amazon's own library finds it.

use std::time::{Duration, SystemTime};

use aws_config::{BehaviorVersion, Region};
use aws_sdk_ecr::error::DisplayErrorContext;
use aws_smithy_http_client::tls::Provider;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{CredentialsError, Found};
use crate::secret::Secret;

/// Where Amazon's registries are: `<account>.dkr.ecr.<region>.<one of these>`.
const SUFFIXES: [&str; 4] = [".amazonaws.com", ".amazonaws.com.cn", ".on.aws", ".on.amazonwebservices.com.cn"];

const PATIENCE: Duration = Duration::from_secs(10);

/// Registries that a token is asked for at a time.
static QUESTIONS: Semaphore = Semaphore::const_new(8);

/// A token, and half of its life: it is renewed well before its end.
pub(super) async fn ask(authority: &str) -> Result<Found, CredentialsError> {
    let failed = |why: String| CredentialsError::Cloud("Amazon's ECR", why);
    let _one = QUESTIONS.acquire().await.map_err(|closed| failed(closed.to_string()))?;
    let asking = Box::pin(token(region(authority)));
    let (token, life) = timeout(PATIENCE, asking)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {} s", PATIENCE.as_secs())))
        .map_err(failed)?;
    let secret = Secret::from_basic(&format!("Basic {token}"));
    let secret = secret.ok_or_else(|| failed("its token is not understood".to_owned()))?;
    Ok(Found { secret: Some(secret), life })
}

async fn token(region: Option<&str>) -> Result<(String, Duration), String> {
    let tls = aws_smithy_http_client::Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring));
    let mut loader = aws_config::defaults(BehaviorVersion::latest()).http_client(tls.build_https());
    if let Some(region) = region {
        loader = loader.region(Region::new(region.to_owned()));
    }
    let config = loader.load().await;
    let answer = aws_sdk_ecr::Client::new(&config).get_authorization_token().send().await;
    // Errors of this library tell no secret.
    let answer = answer.map_err(|error| DisplayErrorContext(error).to_string())?;
    let data = answer.authorization_data().first().ok_or("it gives no token")?;
    let token = data.authorization_token().ok_or("it gives no token")?.to_owned();
    let ends = data.expires_at().and_then(|ends| SystemTime::try_from(*ends).ok()).ok_or("its token has no end")?;
    Ok((token, ends.duration_since(SystemTime::now()).unwrap_or_default() / 2))
}

/// Whether a host is one of Amazon's private registries: others must not be sent a token.
pub(super) fn is_registry(authority: &str) -> bool {
    region(authority).is_some()
}

/// `123456789012.dkr.ecr.eu-west-1.amazonaws.com` and its kin with `dkr-ecr` or `-fips`.
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
    fn a_registrys_name_tells_its_region() {
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
}
