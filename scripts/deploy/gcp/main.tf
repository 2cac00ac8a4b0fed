# The tick as a Cloud Function for every disk that carries the label `snapshotter-node`: function, Scheduler job that calls it as
# an account of its own, roles with what docs/gcp.md grants the taker, an alert. docs/functions.md has the commands.
# Never applied: no terraform and no project were to be had where this was written.

terraform {
  required_version = ">= 1.5"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 5.0"
    }
  }
}

variable "project" {
  type        = string
  description = "The project whose disks are taken."
}

variable "region" {
  type        = string
  description = "Where the function and its schedule run."
}

variable "archive" {
  type        = string
  default     = "snapshotter-function.zip"
  description = "What scripts/build-function gcp made."
}

variable "config_toml" {
  type        = string
  default     = ""
  description = "The config, as snapshotter's own TOML; the rest of a fleet's nodes are found by their labels."
}

variable "schedule" {
  type        = string
  default     = "7 * * * *"
  description = "How often the tick looks (unix-cron, UTC). It takes what is due by each node's own schedule."

  validation {
    condition     = can(regex("^[0-9*,/-]+ [0-9*,/-]+ [0-9*,/-]+ [0-9A-Za-z*,/-]+ [0-9A-Za-z*,/-]+$", var.schedule))
    error_message = "Five fields of unix-cron, such as 7 * * * *."
  }
}

variable "notification_channels" {
  type        = list(string)
  default     = []
  description = "Where the alert goes."
}

provider "google" {
  project = var.project
  region  = var.region
}

locals {
  # docs/gcp.md's, which the tests compare.
  taker = [
    "compute.disks.createSnapshot",
    "compute.disks.get",
    "compute.disks.list",
    "compute.globalOperations.get",
    "compute.instances.get",
    "compute.instantSnapshots.list",
    "compute.snapshots.create",
    "compute.snapshots.get",
    "compute.snapshots.list",
    "compute.snapshots.setLabels",
  ]
  services = [
    "artifactregistry.googleapis.com",
    "cloudbuild.googleapis.com",
    "cloudfunctions.googleapis.com",
    "cloudscheduler.googleapis.com",
    "compute.googleapis.com",
    "run.googleapis.com",
  ]
}

resource "google_project_service" "needed" {
  for_each           = toset(local.services)
  service            = each.value
  disable_on_destroy = false
}

# Who the function is, and what it may do.
resource "google_service_account" "function" {
  account_id   = "snapshotter-function"
  display_name = "snapshotter's tick"
}

resource "google_project_iam_custom_role" "taker" {
  role_id     = "snapshotterTaker"
  title       = "snapshotter taker"
  permissions = local.taker
}

resource "google_project_iam_custom_role" "remover" {
  role_id     = "snapshotterRemover"
  title       = "snapshotter remover"
  permissions = ["compute.snapshots.delete"]
}

resource "google_project_iam_member" "taker" {
  project = var.project
  role    = google_project_iam_custom_role.taker.id
  member  = google_service_account.function.member
}

# Roles know no labels, but names: ours begin with a set's id.
resource "google_project_iam_member" "remover" {
  project = var.project
  role    = google_project_iam_custom_role.remover.id
  member  = google_service_account.function.member

  condition {
    title      = "only what is named as ours"
    expression = "resource.name.startsWith(\"projects/${var.project}/global/snapshots/s2\")"
  }
}

# Its code.
resource "google_storage_bucket" "code" {
  name                        = "${var.project}-snapshotter-function"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
}

resource "google_storage_bucket_object" "code" {
  name   = "snapshotter-function-${filesha256(var.archive)}.zip"
  bucket = google_storage_bucket.code.name
  source = var.archive
}

resource "google_cloudfunctions2_function" "tick" {
  name        = "snapshotter-tick"
  location    = var.region
  description = "snapshotter's tick"
  depends_on  = [google_project_service.needed]

  build_config {
    runtime     = "python312"
    entry_point = "gcf_handler"

    source {
      storage_source {
        bucket = google_storage_bucket.code.name
        object = google_storage_bucket_object.code.name
      }
    }
  }

  service_config {
    available_memory      = "512Mi"
    timeout_seconds       = 900
    max_instance_count    = 1
    service_account_email = google_service_account.function.email
    ingress_settings      = "ALLOW_ALL"

    environment_variables = {
      SNAPSHOTTER_CONFIG_TOML = var.config_toml
      GOOGLE_CLOUD_PROJECT    = var.project
    }
  }
}

# Who may call it: the schedule alone, by an OIDC token.
resource "google_service_account" "invoker" {
  account_id   = "snapshotter-invoker"
  display_name = "calls snapshotter's tick"
}

resource "google_cloud_run_service_iam_member" "invoker" {
  location = var.region
  service  = google_cloudfunctions2_function.tick.name
  role     = "roles/run.invoker"
  member   = google_service_account.invoker.member
}

resource "google_cloud_scheduler_job" "tick" {
  name             = "snapshotter-tick"
  region           = var.region
  description      = "when snapshotter's tick looks"
  schedule         = var.schedule
  time_zone        = "Etc/UTC"
  attempt_deadline = "960s"
  depends_on       = [google_project_service.needed]

  retry_config {
    retry_count          = 3
    min_backoff_duration = "60s"
    max_backoff_duration = "600s"
  }

  http_target {
    http_method = "POST"
    uri         = google_cloudfunctions2_function.tick.service_config[0].uri

    oidc_token {
      service_account_email = google_service_account.invoker.email
      audience              = google_cloudfunctions2_function.tick.service_config[0].uri
    }
  }
}

# The job fails when the function answers with an error, or not at all.
resource "google_monitoring_alert_policy" "failing" {
  display_name          = "snapshotter's tick fails"
  combiner              = "OR"
  notification_channels = var.notification_channels

  conditions {
    display_name = "the Scheduler job failed"

    condition_matched_log {
      filter = "resource.type=\"cloud_scheduler_job\" AND resource.labels.job_id=\"${google_cloud_scheduler_job.tick.name}\" AND severity>=ERROR"
    }
  }

  alert_strategy {
    auto_close = "86400s"

    notification_rate_limit {
      period = "3600s"
    }
  }
}

output "function" {
  value = google_cloudfunctions2_function.tick.name
}
