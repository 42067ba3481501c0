"""Django's settings, all from the environment; what is not set is safe for one machine.

BYRD_DATABASE_URL     the database; Django's tables live in its schema ``beat``
BYRD_APP              the Celery app whose workflows the admin offers (``tasks.app``)
BYRD_WEB_BIND         where the admin listens (``127.0.0.1:8000``)
BYRD_ALLOWED_HOSTS    host names that it answers to, comma-separated (loopback names)
BYRD_WEB_HTTPS        set to 1 behind a proxy that ends TLS and sets X-Forwarded-Proto
BYRD_TRUSTED_ORIGINS  origins that may post forms, comma-separated, as https://host (none but its own)
BYRD_TIME_ZONE        the zone of dates in the admin, and the default one of crontabs (``UTC``)
BYRD_SECRET_KEY       signs sessions; made once and kept in BYRD_STATE_DIR if it is not set
BYRD_STATE_DIR        where that key is kept (``.byrd`` beside the project)
BYRD_DEBUG            set to 1 for Django's debug pages; never in production
"""

from __future__ import annotations

import os
from pathlib import Path

from beat.environment import database, listed, secret_key, switch

BASE_DIR = Path(__file__).resolve().parent.parent
STATE_DIR = Path(os.environ.get("BYRD_STATE_DIR") or BASE_DIR / ".byrd")

DEBUG = switch("BYRD_DEBUG")
SECRET_KEY = secret_key(STATE_DIR)
ALLOWED_HOSTS = listed("BYRD_ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]")
CSRF_TRUSTED_ORIGINS = listed("BYRD_TRUSTED_ORIGINS", "")

BYRD_APP = os.environ.get("BYRD_APP") or "tasks.app"
BYRD_WEB_BIND = os.environ.get("BYRD_WEB_BIND") or "127.0.0.1:8000"

DATABASES = {"default": database()}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

INSTALLED_APPS = [
    "beat.apps.BeatConfig",
    "beat.apps.ScheduleAdminConfig",
    "django_celery_beat",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "beat.urls"
WSGI_APPLICATION = "beat.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("UserAttributeSimilarityValidator", "MinimumLengthValidator", "CommonPasswordValidator")
]

STATIC_URL = "static/"
WHITENOISE_USE_FINDERS = True  # straight from the packages: there is no collectstatic to forget

LOGGING = {  # Django's own would mail the errors of a production server, and to nobody
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "[{asctime}: {levelname}/{name}] {message}", "style": "{"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "django": {"handlers": ["console"], "level": "INFO", "propagate": False},
        "django.request": {"level": "ERROR"},  # not each page that is not found
        "beat": {"handlers": ["console"], "level": "INFO"},
    },
}

USE_TZ = True
TIME_ZONE = os.environ.get("BYRD_TIME_ZONE") or "UTC"
USE_I18N = False
DATE_FORMAT, TIME_FORMAT, DATETIME_FORMAT = "Y-m-d", "H:i:s", "Y-m-d H:i:s"

# Read by django-celery-beat's admin: the zone it proposes for a crontab, and whether schedules will be fired at all.
CELERY_TIMEZONE = TIME_ZONE
CELERY_BEAT_SCHEDULER = "beat.scheduler:ByrdScheduler"

SESSION_COOKIE_NAME = "byrd_session"  # cookies ignore ports: another Django on this host keeps its own
CSRF_COOKIE_NAME = "byrd_csrf"
SESSION_COOKIE_SAMESITE = "Strict"
X_FRAME_OPTIONS = "DENY"
SECURE_REFERRER_POLICY = "same-origin"
if switch("BYRD_WEB_HTTPS"):
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SECURE_HSTS_SECONDS = 31_536_000
    SECURE_SSL_REDIRECT = True
    SECURE_REDIRECT_EXEMPT = ["^health$"]
    SESSION_COOKIE_SECURE = True
    CSRF_COOKIE_SECURE = True
