//! What is served beside the API: health, reflection, the document, the webhook.

use prost::Message;
use serde_json::Value;
use tonic::transport::Channel;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::door::Door;

/// Asks one question of reflection, in either version: they differ in nothing but their name.
macro_rules! reflect {
    ($version:ident, $channel:expr, $question:ident, $argument:expr, $answer:ident) => {{
        use tonic_reflection::pb::$version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let question = MessageRequest::$question($argument);
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(question) };
        let mut client = ServerReflectionClient::new($channel);
        let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        match answers.message().await {
            Ok(Some(answer)) => match answer.message_response {
                Some(MessageResponse::$answer(answer)) => Ok(answer),
                other => Err(format!("{other:?}")),
            },
            other => Err(format!("{other:?}")),
        }
    }};
}

async fn files(channel: Channel, symbol: &str) -> Result<Vec<Vec<u8>>, String> {
    let found = reflect!(v1, channel, FileContainingSymbol, symbol.to_owned(), FileDescriptorResponse);
    found.map(|found| found.file_descriptor_proto)
}

/// A FileDescriptorSet whose files stay the bytes they are.
#[derive(Clone, PartialEq, Message)]
struct Files {
    #[prost(bytes = "vec", repeated, tag = "1")]
    file: Vec<Vec<u8>>,
}

#[tokio::test]
async fn reflection_lists_and_describes_the_public_services_in_both_versions() {
    let door = Door::open().await;
    let channel = door.channel().await;
    let v1 = reflect!(v1, channel.clone(), ListServices, String::new(), ListServicesResponse).unwrap();
    let v1alpha = reflect!(v1alpha, channel.clone(), ListServices, String::new(), ListServicesResponse).unwrap();
    let mut names: Vec<_> = v1.service.into_iter().map(|service| service.name).collect();
    let mut alpha: Vec<_> = v1alpha.service.into_iter().map(|service| service.name).collect();
    names.sort();
    alpha.sort();
    assert_eq!(names, alpha);
    assert_eq!(
        names,
        [
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
            "seckill.v1.Operations",
            "seckill.v1.Orders",
            "seckill.v1.Sales",
        ]
    );
}

#[tokio::test]
async fn describing_a_service_leads_through_all_its_imports() {
    let door = Door::open().await;
    let channel = door.channel().await;
    // As grpcurl does it: the file of the symbol, then every import by its name.
    let mut found = Files { file: files(channel.clone(), "seckill.v1.Orders").await.unwrap() };
    let mut seen = vec!["seckill/v1/orders.proto".to_owned()];
    let mut at = 0;
    while at < found.file.len() {
        let file = prost_types::FileDescriptorProto::decode(found.file[at].as_slice()).unwrap();
        for name in file.dependency {
            if !seen.contains(&name) {
                let import = reflect!(v1, channel.clone(), FileByFilename, name.clone(), FileDescriptorResponse);
                found.file.extend(import.unwrap_or_else(|error| panic!("{name}: {error}")).file_descriptor_proto);
                seen.push(name);
            }
        }
        at += 1;
    }
    let described = prost_reflect::DescriptorPool::decode(found.encode_to_vec().as_slice()).unwrap();
    let orders = described.get_service_by_name("seckill.v1.Orders").unwrap();
    let http = described.get_extension_by_name("google.api.http").unwrap();
    let pay = orders.methods().find(|method| method.name() == "PayOrder").unwrap();
    let rule = pay.options().get_extension(&http).to_string();
    assert!(rule.contains("/v1/orders/{order}:pay"), "the annotations came through unharmed: {rule}");

    assert!(files(channel.clone(), "seckill.internal.v1.Stock").await.is_err(), "I11");
    assert!(files(channel.clone(), "grpc.health.v1.Health").await.is_ok());
    assert!(files(channel, "google.rpc.ErrorInfo").await.is_ok(), "so that clients can show details");
}

#[tokio::test]
async fn health_says_serving_until_the_stop() {
    let door = Door::open().await;
    let mut health = HealthClient::new(door.channel().await);
    for service in ["", "seckill.v1.Sales", "seckill.v1.Orders", "seckill.v1.Operations"] {
        let status = health.check(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::Serving, "{service:?}");
    }
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    door.life.soft_token().cancel();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert!(watch.message().await.unwrap().is_none(), "and nothing holds up the end");
}

#[tokio::test]
async fn unknown_rpcs_are_unimplemented() {
    let door = Door::open().await;
    for path in ["/seckill.v1.Orders/Steal", "/seckill.v1.Nothing/Get", "/seckill.internal.v1.Stock/AcquirePermits"] {
        let mut client = tonic::client::Grpc::new(door.channel().await);
        client.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<proto::v1::GetOrderRequest, proto::v1::Order>::default();
        let request = door.grpc("alice", proto::v1::GetOrderRequest::default());
        let status = client.unary(request, path.parse().unwrap(), codec).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unimplemented, "{path}");
    }
}

#[tokio::test]
async fn every_route_of_the_document_leads_somewhere() {
    let door = Door::open().await;
    let answer = door.get("/openapi.json").send().await;
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let document = answer.json();
    let mut routes = 0;
    for (path, operations) in document["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys() {
            let path = path.replace("{sale}", "no-such").replace("{order}", "x").replace("{saga}", "x");
            let path = path.replace("{dead_letter}", "x");
            let method = method.to_ascii_uppercase().parse().unwrap();
            // Without a token: whoever is asked for one has found a route.
            let answer = door.ask(method, &path).send().await;
            let text = answer.text.as_str();
            assert!(!text.contains("nothing at this path") && answer.status != 405, "{path}: {text}");
            routes += 1;
        }
    }
    assert_eq!(routes, 27, "26 rpcs and the webhook");
}

#[tokio::test]
async fn e27_webhooks_are_handed_on_byte_for_byte() {
    let door = Door::open().await;
    let body = b"{ \"amount\" : 1.00,\n\"odd\": \"\xff\" }".to_vec();
    let path = "/v1/payments/webhook";
    let sent = door.post(path, body.clone()).header("Seckill-Signature", "t=1,v1=ab").send().await;
    assert_eq!((sent.status.as_u16(), sent.json()), (200, Value::Object(Default::default())));
    {
        let webhooks = door.fakes.webhooks.lock().unwrap();
        assert_eq!(webhooks[0].body, body);
        assert_eq!(webhooks[0].signature, "t=1,v1=ab");
    }
    let unsigned = door.post(path, body.clone()).send().await;
    assert_eq!(unsigned.refusal().1, "UNAUTHENTICATED");
    let forged = door.post(path, body).header("Seckill-Signature", "forged").send().await;
    assert_eq!(forged.refusal(), (401, "UNAUTHENTICATED".to_owned(), String::new()));
    let large = door.post(path, vec![b'x'; 65 * 1024]).header("Seckill-Signature", "t=1,v1=ab").send().await;
    assert_eq!(large.status, 413);
    assert_eq!(door.fakes.webhooks.lock().unwrap().len(), 1);
}
