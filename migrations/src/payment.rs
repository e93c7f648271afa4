//! payment's schema: charges, the guard that serialises an order's money, announcements on their way to the bus, and
//! the simulated provider's own books.

use sea_orm_migration::prelude::*;

use crate::new_table;

/// Its migrations, oldest first.
#[derive(Debug)]
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(Charges), Box::new(SimulatedProvider)]
    }

    fn migration_table_name() -> DynIden {
        "payment_migrations".into_iden()
    }
}

#[derive(DeriveIden)]
enum PaymentCharge {
    Table,
    PaymentId,
    OrderId,
    Buyer,
    Currency,
    Units,
    Nanos,
    Method,
    State,
    DeclineCode,
    ProviderReference,
    Surplus,
    Asked,
    AskAt,
    CreateAt,
    UpdateAt,
    Version,
}

#[derive(DeriveIden)]
enum PaymentOrderGuard {
    Table,
    OrderId,
    Voided,
}

#[derive(DeriveIden)]
enum PaymentOutbox {
    Table,
    Seq,
    MessageId,
    Payload,
    Traceparent,
}

struct Charges;

impl MigrationName for Charges {
    fn name(&self) -> &str {
        "m0001_payment_charge"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Charges {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let charges = new_table(manager, PaymentCharge::Table)
            // The idempotency key (E28): one row, one charge at the provider.
            .col(ColumnDef::new(PaymentCharge::PaymentId).string_len(64).not_null().primary_key())
            .col(ColumnDef::new(PaymentCharge::OrderId).string_len(32).not_null())
            .col(ColumnDef::new(PaymentCharge::Buyer).string_len(128).not_null())
            .col(ColumnDef::new(PaymentCharge::Currency).string_len(3).not_null())
            .col(ColumnDef::new(PaymentCharge::Units).big_integer().not_null().check(Expr::cust("units >= 0")))
            .col(ColumnDef::new(PaymentCharge::Nanos).integer().not_null())
            .col(ColumnDef::new(PaymentCharge::Method).string_len(64).not_null())
            // Numbers of seckill.internal.v1.PaymentState.
            .col(ColumnDef::new(PaymentCharge::State).integer().not_null())
            .col(ColumnDef::new(PaymentCharge::DeclineCode).string_len(64))
            .col(ColumnDef::new(PaymentCharge::ProviderReference).string_len(128))
            // Taken although the order's money was taken before: it only goes back (I4).
            .col(ColumnDef::new(PaymentCharge::Surplus).boolean().not_null())
            // How often the provider was asked what became of it, and when to ask next; null when it is settled.
            .col(ColumnDef::new(PaymentCharge::Asked).integer().not_null())
            .col(ColumnDef::new(PaymentCharge::AskAt).big_integer())
            .col(ColumnDef::new(PaymentCharge::CreateAt).big_integer().not_null())
            .col(ColumnDef::new(PaymentCharge::UpdateAt).big_integer().not_null())
            .col(ColumnDef::new(PaymentCharge::Version).big_integer().not_null())
            .to_owned();
        manager.create_table(charges).await?;
        for (name, column) in
            [("payment_charge_by_order", PaymentCharge::OrderId), ("payment_charge_by_ask_at", PaymentCharge::AskAt)]
        {
            let index = Index::create().name(name).table(PaymentCharge::Table).col(column).to_owned();
            manager.create_index(index).await?;
        }
        // One row an order, locked by whoever touches the order's money: what makes I4 hold.
        let guards = new_table(manager, PaymentOrderGuard::Table)
            .col(ColumnDef::new(PaymentOrderGuard::OrderId).string_len(32).not_null().primary_key())
            .col(ColumnDef::new(PaymentOrderGuard::Voided).boolean().not_null())
            .to_owned();
        manager.create_table(guards).await?;
        let outbox = new_table(manager, PaymentOutbox::Table)
            .col(ColumnDef::new(PaymentOutbox::Seq).big_integer().not_null().auto_increment().primary_key())
            // Payment and state: each state is announced once (E25).
            .col(ColumnDef::new(PaymentOutbox::MessageId).string_len(96).not_null().unique_key())
            .col(ColumnDef::new(PaymentOutbox::Payload).blob().not_null())
            .col(ColumnDef::new(PaymentOutbox::Traceparent).string_len(64))
            .to_owned();
        manager.create_table(outbox).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_table(Table::drop().table(PaymentOutbox::Table).to_owned()).await?;
        manager.drop_table(Table::drop().table(PaymentOrderGuard::Table).to_owned()).await?;
        manager.drop_table(Table::drop().table(PaymentCharge::Table).to_owned()).await
    }
}

#[derive(DeriveIden)]
enum PaymentSimCharge {
    Table,
    PaymentId,
    OrderId,
    Currency,
    Units,
    Nanos,
    State,
    ChangeAt,
    CaptureAt,
    Webhooks,
    WebhookAt,
    WebhookTries,
}

struct SimulatedProvider;

impl MigrationName for SimulatedProvider {
    fn name(&self) -> &str {
        "m0002_payment_sim_charge"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for SimulatedProvider {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let charges = new_table(manager, PaymentSimCharge::Table)
            .col(ColumnDef::new(PaymentSimCharge::PaymentId).string_len(64).not_null().primary_key())
            .col(ColumnDef::new(PaymentSimCharge::OrderId).string_len(32).not_null())
            .col(ColumnDef::new(PaymentSimCharge::Currency).string_len(3).not_null())
            .col(ColumnDef::new(PaymentSimCharge::Units).big_integer().not_null())
            .col(ColumnDef::new(PaymentSimCharge::Nanos).integer().not_null())
            .col(ColumnDef::new(PaymentSimCharge::State).integer().not_null())
            .col(ColumnDef::new(PaymentSimCharge::ChangeAt).big_integer().not_null())
            // When a late capture happens; null when none is to come.
            .col(ColumnDef::new(PaymentSimCharge::CaptureAt).big_integer())
            // Webhooks still to deliver, when the next one is due, and how often it was refused.
            .col(ColumnDef::new(PaymentSimCharge::Webhooks).integer().not_null())
            .col(ColumnDef::new(PaymentSimCharge::WebhookAt).big_integer())
            .col(ColumnDef::new(PaymentSimCharge::WebhookTries).integer().not_null())
            .to_owned();
        manager.create_table(charges).await?;
        for (name, column) in [
            ("payment_sim_charge_by_capture_at", PaymentSimCharge::CaptureAt),
            ("payment_sim_charge_by_webhook_at", PaymentSimCharge::WebhookAt),
        ] {
            let index = Index::create().name(name).table(PaymentSimCharge::Table).col(column).to_owned();
            manager.create_index(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_table(Table::drop().table(PaymentSimCharge::Table).to_owned()).await
    }
}
