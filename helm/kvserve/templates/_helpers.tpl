{{/* Name that all objects begin with; at most 40 characters, so that every suffix fits into a DNS label. */}}
{{- define "kvserve.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" (.Release.Name | trunc 32 | trimSuffix "-") .Chart.Name -}}
{{- end -}}
{{- end -}}

{{/* Labels of every object. */}}
{{- define "kvserve.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: kvserve
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Labels that select a component's pods; they never change: (list $ "operator"). */}}
{{- define "kvserve.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* A component's image: (list $ .Values.operator.image). */}}
{{- define "kvserve.image" -}}
{{- $image := index . 1 -}}
{{- printf "%s:%s" $image.repository ($image.tag | default (index . 0).Chart.AppVersion) -}}
{{- end -}}

{{- define "kvserve.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "kvserve.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What a pod needs to know about itself, and where telemetry goes. */}}
{{- define "kvserve.env" -}}
- name: POD_NAME
  valueFrom:
    fieldRef: {fieldPath: metadata.name}
- name: POD_NAMESPACE
  valueFrom:
    fieldRef: {fieldPath: metadata.namespace}
{{- with .Values.otel.endpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* Files that the controller proves itself with. */}}
{{- define "kvserve.security.mounts" -}}
{{- if .Values.security.secretName }}
- {name: secret, mountPath: /etc/kvserve/secret, readOnly: true}
{{- end }}
{{- if .Values.security.tlsSecretName }}
- {name: tls, mountPath: /etc/kvserve/tls, readOnly: true}
{{- end }}
{{- end -}}

{{- define "kvserve.security.volumes" -}}
{{- if .Values.security.secretName }}
- name: secret
  secret: {secretName: {{ .Values.security.secretName | quote }}, defaultMode: 0440}
{{- end }}
{{- if .Values.security.tlsSecretName }}
- name: tls
  secret: {secretName: {{ .Values.security.tlsSecretName | quote }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{/* Where a pod may be placed: the component's values. */}}
{{- define "kvserve.scheduling" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Port of the OTLP endpoint. */}}
{{- define "kvserve.otelPort" -}}
{{- $url := urlParse .Values.otel.endpoint -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{- $port | default (eq $url.scheme "https" | ternary "443" "80") -}}
{{- end -}}

{{/* What operator and controller may call: DNS, the API server, the OTLP endpoint. */}}
{{- define "kvserve.egress" -}}
egress:
  - ports:
      - {protocol: UDP, port: 53}
      - {protocol: TCP, port: 53}
  - ports:
      {{- range .Values.networkPolicy.apiServerPorts }}
      - {protocol: TCP, port: {{ . }}}
      {{- end }}
  {{- if .Values.otel.endpoint }}
  - ports:
      - {protocol: TCP, port: {{ include "kvserve.otelPort" . }}}
  {{- end }}
{{- end -}}
